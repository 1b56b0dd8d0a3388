"""Write the prior's folder, draw with it, and measure how well emoji-clip reads what it draws."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_rtb.files.whole import write_json
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from pipelines._models.folder import left_out
from pipelines.emoji import COLOURS, NAMES, STYLES, caption
from pipelines.emoji.build import captions, clip, unet, vae
from pipelines.emoji.build.drawings import Bytes, Drawings, composite

log = logging.getLogger(__name__)

SHEET_GUIDANCE, SHEET_STEPS = 2.5, 20
SHIFT = 3.0  # of the flow's sigmas where noise is added: most steps where the caption decides, at high noise


def pipeline(work: Path) -> StableDiffusionPipeline:
    """The prior as a Stable Diffusion pipeline in single precision, from the checkpoints in `work`."""
    model, steps = unet.trained(work)
    log.info("denoiser at step %d", steps)
    return StableDiffusionPipeline(
        vae=vae.trained(work),
        text_encoder=model.text,
        tokenizer=captions.tokenizer(),
        unet=model.unet,
        scheduler=unet.schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(folder: Path) -> DiffusionPipeline:
    """An exported prior in single precision, without progress bars; diffusers wants to be told that T5 is absent."""
    pipe = DiffusionPipeline.from_pretrained(str(folder), **dict.fromkeys(left_out(folder, DiffusionPipeline)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: DiffusionPipeline, prompts: list[str], *, steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Pictures (prompts, 64, 64, 3) uint8, 64 at a time, by DDIM with eta 1 or by the flow's scheduler."""
    flow = isinstance(pipe, StableDiffusion3Pipeline)
    options: dict[str, Any] = {"max_sequence_length": 1} if flow else {"eta": 1.0}
    generator, parts = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), 64):
        out = pipe(
            prompts[start : start + 64],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            **options,
        )
        parts.append(clip.quantise(out.images * 2 - 1))
    return torch.cat(parts)


def labelled_prompts(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Full captions with their labels (count, 3); names in turn, style and colour at random."""
    rng = np.random.default_rng(seed)
    names = np.resize(rng.permutation(len(NAMES)), count)
    labels = np.stack([names, rng.integers(0, len(STYLES), count), rng.integers(0, len(COLOURS), count)], axis=1)
    words = [(NAMES[n], STYLES[s], list(COLOURS)[c]) for n, s, c in labels.tolist()]
    return [caption(*w) for w in words], torch.from_numpy(labels)


def sheet(folder: Path, file: Path) -> None:
    """Draw 64 captions, guidance on, into one picture with the captions underneath."""
    prompts, _ = labelled_prompts(64, seed=3)
    images = draw(load(folder), prompts, steps=SHEET_STEPS, guidance=SHEET_GUIDANCE)
    cell_w, cell_h, scale = 152, 168, 2
    canvas = Image.new("RGB", (8 * cell_w, 8 * cell_h), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % 8 * cell_w, i // 8 * cell_h
        picture = Image.fromarray(image.numpy()).resize((64 * scale, 64 * scale), Image.Resampling.NEAREST)
        canvas.paste(picture, (x + (cell_w - 64 * scale) // 2, y + 4))
        for row, text in enumerate(prompt.replace(" emoji, ", "|").replace(", ", "|").split("|")):
            pen.text((x + cell_w // 2, y + 66 * scale + 10 * row + 4), text, fill="black", anchor="ma", font_size=10)
    canvas.save(file, optimize=True)


@torch.no_grad()
def read(model: open_clip.CLIP, images: Tensor, texts: list[str]) -> Tensor:
    """Zero-shot probabilities (images, texts) of pictures (images, 64, 64, 3) uint8."""
    tokens = open_clip.SimpleTokenizer(context_length=clip.CONTEXT)(texts)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    image = torch.cat([model.encode_image(part, normalize=True) for part in x.split(128)])
    text = model.encode_text(tokens, normalize=True)
    return (model.logit_scale.exp() * image @ text.T).softmax(dim=-1)


def accuracies(model: open_clip.CLIP, images: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """Zero-shot top-1 of name (among `names`), style and background, and the mean probability of the true background."""
    result = {"candidates": float(len(names))}
    for part, texts, column in (
        ("name", [caption(n) for n in names], 0),
        ("style", [caption(None, s) for s in STYLES], 1),
        ("background", [caption(None, None, c) for c in COLOURS], 2),
    ):
        chance = read(model, images, texts)
        result[part] = float((chance.argmax(-1) == labels[:, column]).float().mean())
        result[f"{part} probability"] = float(chance.gather(1, labels[:, column, None]).mean())
    return {k: round(v, 3) for k, v in result.items()}


def report(drawings: Drawings, work: Path, prior: Path, clip_folder: Path) -> None:
    """Measure the drawings, their reconstructions and the prior; write `work/report.json`."""
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    rng = np.random.default_rng(5)
    result: dict[str, dict[str, float]] = {}
    held_out = clip.split(drawings)[1]
    for title, subset in (("held-out names", held_out), ("prior's names", drawings.known)):
        index, styles = (g.ravel() for g in np.mgrid[: len(subset), : len(STYLES)])
        colours = rng.integers(0, len(COLOURS), len(index))
        real = composite(drawings.rgba[subset[index], styles], [list(COLOURS)[c] for c in colours], rng)
        labels, words = torch.from_numpy(np.stack([index, styles, colours], 1)), [drawings.names[i] for i in subset]
        result[f"{title}, drawings"] = accuracies(model, torch.from_numpy(real), labels, words)
        result[f"{title}, reconstructions"] = accuracies(model, reconstruct(work, real), labels, words)
    _write(work / "report.json", result | samples(load(prior), model))


def report_flow(work: Path, folder: Path, prior: Path, clip_folder: Path) -> None:
    """Measure the flow prior by its own scheduler and by the one with noise, beside the emoji prior; `work/report_flow.json`."""
    model, pipe = open_clip.create_model(f"local-dir:{clip_folder}").eval(), load(folder)
    result = {f"emoji, {title}": values for title, values in samples(load(prior), model).items()}
    result |= {f"flow, ODE, {title}": values for title, values in samples(pipe, model).items()}
    pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config, shift=SHIFT)
    result |= {f"flow, SDE, {title}": values for title, values in samples(pipe, model).items()}
    _write(work / "report_flow.json", result)


def samples(pipe: DiffusionPipeline, model: open_clip.CLIP) -> dict[str, dict[str, float]]:
    """Readings of a full caption of each name at three settings, and how evenly open captions, three a name, are filled in."""
    result: dict[str, dict[str, float]] = {}
    prompts, labels = labelled_prompts(len(NAMES), seed=11)
    for steps, guidance in ((12, 1.0), (12, 2.0), (20, 2.5)):
        images = draw(pipe, prompts, steps=steps, guidance=guidance, seed=1)
        result[f"samples, {steps} steps, guidance {guidance}"] = accuracies(model, images, labels, list(NAMES))
    images = draw(pipe, [caption(name) for name in NAMES] * 3, steps=20, guidance=1.0, seed=1)
    for part, texts in (
        ("styles", [caption(None, s) for s in STYLES]),
        ("backgrounds", [caption(None, None, c) for c in COLOURS]),
    ):
        share = read(model, images, texts).argmax(-1).bincount(minlength=len(texts)) / len(images)
        result[f"open captions, {part}"] = dict(zip(texts, share.tolist(), strict=True)) | {
            "entropy": float(torch.special.entr(share).sum()),
            "most": math.log(len(texts)),
        }
    return result


def _write(file: Path, result: dict[str, dict[str, float]]) -> None:
    write_json(file, result, indent=2)
    for title, values in result.items():
        log.info("%s: %s", title, values)


@torch.no_grad()
def reconstruct(work: Path, images: Bytes) -> Tensor:
    """Pictures (batch, 64, 64, 3) uint8 through the autoencoder with noise of standard deviation 0.1 in the latents."""
    model, parts = vae.trained(work), []
    for part in np.array_split(images, max(1, len(images) // 64)):
        z = model.encode(vae.pixels(part)).latent_dist.mean
        noise = 0.1 / float(model.config.scaling_factor) * torch.randn_like(z)
        parts.append(clip.quantise(model.decode(z + noise).sample))
    return torch.cat(parts)
