"""A diffusers family is one file: one that nobody registered is trained, sampled and exported from a config."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.interfaces import Prior
from tests.oracles.tiny import WIDTH, tiny_stable_diffusion_3

FAMILY = f'''
"""Stable Diffusion 3 on embeddings of its own: another pipeline, denoiser, network output and call."""

import zlib

import torch

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._models.proof import Parts

__all__ = ["Three"]


class Three(DiffusersPrior):
    family = "three"
    pipeline = "StableDiffusion3Pipeline"
    parts = Parts(("vae", "transformer"))
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    without = [f"{{part}}{{n}}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]

    def __init__(self, path: str, *, steps: int = 4, scheduler: str | None = None, device: str | None = "cpu"):
        super().__init__(path, steps=steps, scheduler=scheduler, device=device)

    @property
    def dims(self):
        return (4, 8, 8)

    def arguments(self, prompts):
        tokens = torch.stack([self._tokens(prompt) for prompt in prompts])
        return self.settings() | {{
            "prompt_embeds": tokens, "pooled_prompt_embeds": tokens[:, 0], "guidance_scale": 1.0, "height": 64, "width": 64
        }}

    def _tokens(self, prompt):
        return torch.randn(5, {WIDTH}, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))

    def features(self, prompts):
        return torch.stack([self._tokens(prompt).mean(0) for prompt in prompts])

    @torch.no_grad()
    def decode(self, x_0):
        images = self.pipe.vae.decode(x_0 / self.pipe.vae.config.scaling_factor).sample
        return self.pipe.image_processor.postprocess(images, output_type="pt").float()
'''

CONFIG = """
prior: {component: "family_of_others.three:Three", path: model}
reward: {component: brightness}
posterior: {rank: 2}
beta: 1.0
prompts: {list: [a cat]}
train: {iterations: 2, prompts_per_iteration: 1, group: 2, micro_batch: 2, lr: 0.01, grid_every: 0}
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "family_of_others"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "three.py").write_text(FAMILY)
    tiny_stable_diffusion_3().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path / "model"


def test_it_is_trained_sampled_and_exported(model: Path) -> None:
    Path("three.yaml").write_text(CONFIG)
    for words in (["train", "three.yaml"], ["sample", "runs/three", "-n", "1"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
    rows = [json.loads(line) for line in Path("runs/three/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert max(row["parity"] for row in rows) < 1e-4
    weights = load_file("runs/three/lora/pytorch_lora_weights.safetensors")
    assert weights
    assert all(name.startswith("transformer.") for name in weights)
    card = Path("runs/three/lora/README.md").read_text()
    assert "pipe = StableDiffusion3Pipeline.from_pretrained('model', dtype=torch.float32, text_encoder=None, " in card
    assert "from diffusion_rtb.schedulers import FlowMatchSDEScheduler" in card
    assert "kohya" not in card
    untuned = build({"component": "family_of_others.three:Three", "path": "model"}, "prior")
    assert isinstance(untuned, Prior)
    stock = tiny_stable_diffusion_3()
    before = drawn(stock, untuned)
    torch.testing.assert_close(before, drawn(untuned.pipe, untuned))
    stock.load_lora_weights("runs/three/lora")
    assert not torch.allclose(before, drawn(stock, untuned), atol=1e-4), "the file holds what was trained"


def drawn(pipe: Any, prior: Prior) -> torch.Tensor:
    torch.manual_seed(0)  # the pipeline gives its scheduler no generator
    call = prior.arguments(["a cat"]) | {"output_type": "latent"}
    latents: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return latents


def test_samplers_of_noise_are_refused_for_a_flow(model: Path) -> None:
    with pytest.raises(ValueError, match=r"DDIMScheduler .*velocity of a flow.*FlowMatchSDEScheduler"):
        describe(
            {"component": "family_of_others.three:Three", "path": str(model), "scheduler": "DDIMScheduler"}, "prior"
        )
