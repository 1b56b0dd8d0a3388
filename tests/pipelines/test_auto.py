"""Pipelines without a family file, from config and signature alone: ControlNet, image-to-image, inpainting, no picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import entry_of, replay_backward, rollout, score
from diffusion_rtb.chain.seeds import generators
from diffusion_rtb.config.load import load_config
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.training.assemble import assemble
from pipelines.auto import Auto
from tests.oracles.tiny import save_tiny, tiny_stable_diffusion, tiny_unet

PROMPTS = ("a cat", "a red dog")
ROWS = [{"image": f"pictures/{name}.png", "mask_image": f"pictures/{name}_mask.png"} for name in ("cat", "dog")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file and its pictures, beside it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "pictures").mkdir()
    noise = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"pictures/{name}.png")
        mask = torch.zeros(64, 64, dtype=torch.uint8)
        mask[:32] = 255
        Image.fromarray(mask.numpy()).save(folder / f"pictures/{name}_mask.png")
    lines = [json.dumps({"prompt": prompt} | row) for prompt, row in zip(PROMPTS, ROWS, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, with a ControlNet, and with a network that fills in."""
    folder, parts = tmp_path_factory.mktemp("models"), tiny_stable_diffusion().components
    save_tiny(folder / "plain")
    torch.manual_seed(1)
    control = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3)
    with torch.no_grad():
        for name, weight in control.named_parameters():
            if "controlnet" in name:  # zero at the start, so that it has no say
                weight.normal_(std=0.2)
    StableDiffusionControlNetPipeline(controlnet=control, **parts, requires_safety_checker=False).save_pretrained(
        folder / "control"
    )
    wide = UNet2DConditionModel.from_config(dict(tiny_unet().config) | {"in_channels": 9}).eval()
    StableDiffusionInpaintPipeline(**(parts | {"unet": wide}), requires_safety_checker=False).save_pretrained(
        folder / "fill"
    )
    return folder


CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "controlnet": ("control", {"call": {"controlnet_conditioning_scale": 0.8}}),
    "image-to-image": ("plain", {"pipeline": "StableDiffusionImg2ImgPipeline", "call": {"strength": 0.75}}),
    "inpainting": ("fill", {}),
    "plain": ("plain", {"embeds": []}),
}


def made(models: Path, pictures: Path, case: str, **settings: Any) -> Auto:
    name, own = CASES[case]
    given: dict[str, Any] = {"steps": 4, "guidance": 2.0, "device": "cpu"} | own | settings
    prior = Auto(str(models / name), **given)
    prior.read_prompts(PROMPTS, ROWS, pictures)
    return prior


@pytest.mark.parametrize("case", CASES)
def test_chain_density_decode_and_gradients(models: Path, pictures: Path, case: str) -> None:
    prior = made(models, pictures, case)
    drawn = rollout(prior, PROMPTS, [1, 2])
    assert drawn.steps == (3 if case == "image-to-image" else 4)
    assert torch.equal(score(prior, PROMPTS, drawn), drawn.log_prob)
    call = prior.arguments(PROMPTS) | {"generator": generators([1, 2]), "output_type": "pt", "return_dict": False}
    with torch.no_grad():
        own = prior.pipe(**call)[0]
    torch.testing.assert_close(prior.decode(drawn.x_0), own, rtol=0, atol=1e-5)
    if prior.pictures.columns:
        before = prior.fingerprint()["pictures"]
        prior.read_prompts(PROMPTS, ROWS[::-1], pictures)
        assert prior.fingerprint()["pictures"] != before
        assert (rollout(prior, PROMPTS, [1, 2]).x_0 - drawn.x_0).abs().amax() > 0.01, "the picture matters"
        prior.read_prompts(PROMPTS, ROWS, pictures)
    prior.attach(rank=1)
    assert torch.equal(score(prior, PROMPTS, drawn), drawn.log_prob), "the posterior starts as the prior"
    call, entry = prior.arguments(PROMPTS), entry_of(prior)
    replay_backward(prior.pipe, drawn, torch.ones_like(drawn.log_prob), call=call, entry=entry)
    assert all(value.grad is not None for value in prior.parameters().values())
    assert any(value.grad.any() for value in prior.parameters().values() if value.grad is not None)


def test_networks_of_four_channels_cannot_fill_in(models: Path, pictures: Path) -> None:
    prior = made(models, pictures, "plain", pipeline="StableDiffusionInpaintPipeline")
    with pytest.raises(ValueError, match="latents were changed between steps"):
        rollout(prior, PROMPTS, [1, 2])


CONFIG = """
prior: {component: auto, path: MODEL, steps: 2, device: cpu}
posterior: {rank: 2}
reward: {component: brightness}
beta: 2.0
prompts: {file: prompts.jsonl}
train: {iterations: 1, prompts_per_iteration: 2, group: 2, micro_batch: 2, lr: 0.01, grid_every: 0}
"""


def test_it_is_trained_and_sampled_by_its_snippet(models: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "run.yaml").write_text(CONFIG.replace("MODEL", str(models / "control")) + f"out: {tmp_path}\n")
    trainer = assemble(load_config(pictures / "run.yaml"))
    trainer.fit()
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["parity"] == 0.0
    prior: Any = trainer.sampler.prior
    (tmp_path / "lora").mkdir()
    prior.export(tmp_path / "lora", "card")
    found: dict[str, Any] = {}
    exec(prior.snippet(folder=str(tmp_path / "lora"), prompt="a cat"), found)
    assert found["image"].size == (64, 64)


def refused(folder: Path, rows: Sequence[Mapping[str, Any]], models: Path, **settings: Any) -> str:
    """What is said before any weights load."""
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prior = {"component": "auto", "path": str(models / "control"), "steps": 3, "device": "cpu"} | settings
    (folder / "run.yaml").write_text(CONFIG.replace("MODEL", "x"))
    config = load_config(
        folder / "run.yaml", [f"prior={json.dumps(prior)}", f"train.prompts_per_iteration={len(rows)}"]
    )
    with pytest.raises(ValueError, match=r"\.$|\?$") as error:
        describe_components(config)
    return str(error.value)


def test_pictures_that_are_not_there_are_refused(models: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "pictures", tmp_path / "pictures")
    Image.new("RGB", (32, 64)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    cat = {"prompt": "a cat", "image": "pictures/cat.png"}
    for row, expected in (
        ({"prompt": "a dog"}, "has no column 'image'"),
        ({"prompt": "a dog", "images": "pictures/dog.png"}, "Did you mean 'images'?"),
        ({"prompt": "a dog", "image": "pictures/dgo.png"}, "there is no file"),
        ({"prompt": "a dog", "image": "text.png"}, "no picture that Pillow can read"),
        ({"prompt": "a dog", "image": "small.png"}, "64 x 64 for 'a cat' and 32 x 64 for 'a dog'"),
    ):
        assert expected in refused(tmp_path, [cat, row], models)
    prior = made(models, pictures, "controlnet")
    with pytest.raises(ValueError, match="'a cow' has no picture for `image`: it is none of the run's 2 prompts"):
        prior.arguments(["a cow"])


def test_what_the_pipeline_does_not_have_is_refused(models: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "pictures", tmp_path / "pictures")
    rows = [{"prompt": prompt} | row for prompt, row in zip(PROMPTS, ROWS, strict=True)]
    for settings, expected in (
        ({"call": {"controlnet_scale": 1.0}}, "Did you mean 'controlnet_conditioning_scale'?"),
        ({"call": {"num_inference_steps": 3}}, "call.num_inference_steps: that is decided by prior.steps"),
        ({"images": {"picture": "image"}}, "has no argument 'picture'"),
        ({"denoiser": "transformer"}, "it has vae, text_encoder, unet, controlnet"),
        ({"pipeline": "StableDifusionPipeline"}, "Did you mean 'StableDiffusionPipeline'?"),
        ({"path": str(models / "plain"), "pipeline": "StableDiffusionControlNetPipeline"}, "has no controlnet"),
        ({"path": str(models / "plain"), "pipeline": "StableDiffusionXLPipeline"}, "has no text_encoder_2"),
    ):
        assert expected in refused(tmp_path, rows, models, **settings)


def test_the_recorder_changes_no_number(models: Path, pictures: Path) -> None:
    prior = made(models, pictures, "inpainting")
    call = prior.arguments(PROMPTS) | {"output_type": "latent", "return_dict": False}
    with torch.no_grad():
        own = prior.pipe(**call, generator=generators([1, 2]))[0]
        with TrajectoryRecorder(prior.pipe.scheduler):
            recorded = prior.pipe(**call, generator=generators([1, 2]))[0]
    assert torch.equal(own, recorded)
