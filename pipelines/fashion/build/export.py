"""Write the two folders of weights, a sheet of samples, and measure both models."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.files.whole import whole, write_json
from pipelines.emoji.build.folder import export_prior
from pipelines.fashion import CLASSES
from pipelines.fashion.build import classifier, prior
from pipelines.fashion.build.data import Pictures

log = logging.getLogger(__name__)

LICENCE = "LICENSE-fashion-mnist.txt"
STEPS = 10  # of the sheet and the report
DRAWN = 512  # for the report
SHEET = (8, 12)


def export_denoiser(work: Path, folder: Path, licences: Path) -> None:
    """The averaged denoiser as a stock pipeline in half precision, which loads in single precision."""
    pipe, steps = prior.pipeline(work)
    log.info("denoiser at step %d", steps)
    export_prior(pipe, folder, licences=licences)


def export_classifier(work: Path, folder: Path, licences: Path) -> None:
    """Weights in half precision, and classifier.json: architecture, size and classes."""
    model, steps = classifier.trained(work)
    log.info("classifier at step %d", steps)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with whole(folder / "model.safetensors") as unfinished:
        save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished)
    described = {
        "model": f"timm:{classifier.ARCHITECTURE}",
        "size": classifier.SIZE,
        "classes": list(CLASSES),
    }
    write_json(folder / "classifier.json", described, indent=2)
    if licences != folder:
        shutil.copy(licences / LICENCE, folder)


def load_classifier(folder: Path) -> Any:
    """The exported network in single precision."""
    model = classifier.create()
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def draw(folder: Path, count: int, *, steps: int = STEPS, seed: int = 0) -> Float[Tensor, "count 1 32 32"]:
    """Samples in [-1, 1] of the exported prior by stock diffusers, 64 at a time."""
    pipe = DDPMPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        pipe(batch_size=min(64, count - start), num_inference_steps=steps, generator=generator, output_type="np").images
        for start in range(0, count, 64)
    ]
    return torch.cat([torch.from_numpy(part).permute(0, 3, 1, 2) for part in parts]) * 2 - 1


def sheet(folder: Path, file: Path) -> None:
    """Samples, not selected."""
    tile(draw(folder, SHEET[0] * SHEET[1]), SHEET[1]).save(file)


def tile(images: Float[Tensor, "count 1 32 32"], columns: int) -> Image.Image:
    """Pictures in rows of `columns`."""
    rows = images.add(1).mul(127.5).round().clamp(0, 255).byte().unflatten(0, (-1, columns))[:, :, 0]
    return Image.fromarray(rows.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2).numpy())


def report(test: Pictures, prior_folder: Path, classifier_folder: Path) -> None:
    """Log the classifier's accuracy and calibration on the test half, and how it sees samples of the prior."""
    model = load_classifier(classifier_folder)
    log_probs = classifier.logits(model, test.images).log_softmax(1)
    accuracy = float((log_probs.argmax(1) == test.labels).float().mean())
    error = classifier.calibration_error(log_probs, test.labels)
    nll = float(torch.nn.functional.nll_loss(log_probs, test.labels))
    log.info("accuracy %.4f, ECE %.4f, NLL %.4f nats on %d", accuracy, error, nll, len(test.labels))
    log.info(
        "least log-probability on them %.2f, median of wrong classes %.2f",
        float(log_probs.min()),
        float(log_probs.median()),
    )
    seen = classifier.logits(model, draw(prior_folder, DRAWN)).log_softmax(1)
    shares = torch.bincount(seen.argmax(1), minlength=len(CLASSES)) / len(seen)
    entropy = float(-(seen.exp() * seen).sum(1).mean())
    log.info("%d samples, %d steps: entropy of p(y | x) %.3f nats", len(seen), STEPS, entropy)
    log.info(
        "their classes: %s",
        ", ".join(f"{name} {share:.3f}" for name, share in zip(CLASSES, shares.tolist(), strict=True)),
    )
    real = float(-(log_probs.exp() * log_probs).sum(1).mean())
    log.info("test pictures: entropy of p(y | x) %.3f nats", real)
