"""An exported posterior in a process that knows only plain diffusers, and its model card."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from diffusion_rtb.run.model_card import model_card
from diffusion_rtb.run.progress import Progress
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny, tiny_stable_diffusion

CONFIG: dict[str, Any] = {
    "name": "tiny-blue",
    "seed": 7,
    "prior": {"component": "stable_diffusion", "steps": 4},
    "reward": {"component": "clip_score", "model": "ViT-B-32"},
    "beta": 12.5,
    "objective": {"component": "rtb", "log_z": "vargrad"},
    "prompts": {"list": ["a cat | a dog"]},
    "train": {"iterations": 70, "prompts_per_iteration": 4, "group": 8, "lr": 1e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def tuned(folder: str, targets: list[str], **settings: Any) -> StableDiffusion:
    """A posterior whose adapters are far from the identity; alpha / rank is not 1."""
    arguments: dict[str, Any] = {"steps": 4, "device": "cpu", "guidance": 3.0}
    prior = StableDiffusion(folder, **arguments | settings)
    prior.attach(rank=4, alpha=6.0, target_modules=targets, seed=0)
    for parameter in prior.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return prior


def card(prior: StableDiffusion, out: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "base_model": prior.base_model,
        "snippet": prior.snippet(str(out), "a cat emoji"),
        "fingerprint": prior.fingerprint(),
        "trained": Progress(100, 100, 12.5),
    }
    return model_card(CONFIG, **arguments | changes)


def sample(prior: StableDiffusion) -> Tensor:
    images: Tensor = prior.pipe(
        **prior.arguments(["a cat emoji"]), generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    return images


def code_in(markdown: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", markdown, re.DOTALL)
    assert found is not None
    return found[1]


TARGETS = {
    "DDIMScheduler": ["to_q", "to_k", "to_v", "to_out.0"],
    "EulerAncestralDiscreteScheduler": ["to_q", "to_out.0", "conv1", "ff.net.2", "time_emb_proj", "proj_in", "conv_in"],
}

AGAIN = """
assert image.size == (64, 64)
again = pipe("a cat emoji", generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
from safetensors.torch import save_file
save_file({"image": again}, "image.safetensors")
import sys
assert not {"diffusion_rtb", "pipelines", "rewards"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def drawn(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[StableDiffusion, Tensor]]:
    """Each posterior with the image of its card's snippet, all drawn in one process that knows plain diffusers only."""
    out, priors = tmp_path_factory.mktemp("cards"), {}
    for scheduler, targets in TARGETS.items():
        priors[scheduler] = prior = tuned(folder, targets, scheduler=scheduler)
        prior.export(out / scheduler / "lora", card(prior, out / scheduler / "lora"))
        (out / scheduler / "plain.py").write_text(code_in((out / scheduler / "lora" / "README.md").read_text()) + AGAIN)
    each = f"import os, runpy\nfor name in {list(priors)}:\n  os.chdir(name)\n  runpy.run_path('plain.py')\n  os.chdir('..')"
    # Isolated mode: neither PYTHONPATH nor the current folder leads to this package.
    subprocess.run([sys.executable, "-I", "-c", each], cwd=out, check=True, capture_output=True)
    return {name: (prior, load_file(out / name / "image.safetensors")["image"]) for name, prior in priors.items()}


@pytest.mark.parametrize("scheduler", TARGETS)
def test_the_cards_snippet_draws_the_same_image_without_this_package(
    drawn: dict[str, tuple[StableDiffusion, Tensor]], scheduler: str
) -> None:
    prior, plain = drawn[scheduler]
    torch.testing.assert_close(plain, sample(prior), atol=1e-5, rtol=0)
    with prior.as_prior():
        assert (plain - sample(prior)).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["to_q", "conv1"], ["conv_in", "conv_out", "linear_1", "conv_shortcut"]])
def test_all_kinds_of_layers_survive_the_export(folder: str, tmp_path: Path, targets: list[str]) -> None:
    prior = tuned(folder, targets)
    prior.export(tmp_path, "")
    plain = tiny_stable_diffusion()
    plain.load_lora_weights(str(tmp_path))
    images = plain(
        "a cat emoji",
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close(images, sample(prior), atol=1e-5, rtol=0)
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == len(prior.parameters())


def test_the_sampler_is_exported_with_the_weights(folder: str, tmp_path: Path) -> None:
    prior = tuned(folder, ["to_q"], scheduler_arguments={"timestep_spacing": "trailing"})
    prior.export(tmp_path, "the card")
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config == prior.pipe.scheduler.config
    assert (tmp_path / "README.md").read_text() == "the card"


def test_there_must_be_a_posterior_to_export(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no posterior to export"):
        StableDiffusion(folder, steps=4, device="cpu").export(tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_card_tells_the_recipe(folder: str, tmp_path: Path) -> None:
    text = card(tuned(folder, ["to_q", "conv1"]), tmp_path)
    for said in (
        "exp(beta · r(x))",
        "clip_score(model='ViT-B-32')",
        "| beta (nats per unit of reward) | 12.5 |",
        "| objective | rtb(log_z='vargrad') |",
        "| prior | guided, guidance scale 3 |",
        "| sampler | DDIMScheduler |",
        "| eta | 1 |",
        "| LoRA rank, alpha | 4, 6 |",
        "| LoRA modules | conv1, to_q |",
        "| trajectories per iteration | 4 prompts x 8 |",
        "| learning rate | 0.001 |",
        "Not evaluated",
    ):
        assert said in text
    compile(code_in(text), "snippet", "exec")
    configuration = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert configuration is not None
    assert yaml.safe_load(configuration[1]) == CONFIG


@pytest.mark.parametrize(
    ("base_model", "hub"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("pipelines/emoji/weights", False),
        ("./model", False),
        ("/model", False),
    ],
)
def test_front_matter_names_only_hub_models(folder: str, tmp_path: Path, base_model: str, hub: bool) -> None:
    text = card(tuned(folder, ["to_q"]), tmp_path, base_model=base_model, license_id="creativeml-openrail-m")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front.get("base_model") == (base_model if hub else None)
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert front["license"] == "creativeml-openrail-m"
    assert "lora" in front["tags"]


def test_evaluation_becomes_a_table(folder: str, tmp_path: Path) -> None:
    evaluation = {
        "reward": {
            "prior": {"mean": 0.123456, "low": 0.1, "high": 0.2},
            "reweighted_prior": {"mean": 0.45, "low": None, "high": None},
            "posterior": {"mean": 0.5, "low": 0.4, "high": 0.6},
        },
        "KL | nats": {"prior": None, "posterior": 1.25},
        "samples": {"prior": 400, "posterior": 400},
    }
    text = card(tuned(folder, ["to_q"]), tmp_path, evaluation=evaluation)
    assert "| reward | 0.1235 [0.1, 0.2] | 0.45 | 0.5 [0.4, 0.6] |" in text
    assert "| KL \\| nats | – | – | 1.25 |" in text
    assert "| samples | 400 | – | 400 |" in text
    assert "Not evaluated" not in text
