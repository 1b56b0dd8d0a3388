"""Every family whose tiny pipeline is in `tests/oracles/families/`, found by itself: drawn, scored, trained and decoded there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.chain.rollout import entry_of, replay_backward, rollout, score
from diffusion_rtb.config.components import build, describe, short_names
from pipelines._diffusers.prior import DiffusersPrior
from tests.oracles.pretended_device import DEVICE, counted

ROOT = Path(__file__).parents[3]
STEPS = 3


def is_family(name: str) -> bool:
    module = importlib.import_module(f"pipelines.{name}")
    return issubclass(getattr(module, module.__all__[0]), DiffusersPrior)


TINY = {path.stem for path in (ROOT / "tests/oracles/families").glob("[!_]*.py")}
FAMILIES = [name for name in sorted(TINY & set(short_names("prior"))) if is_family(name)]


def prior_of(name: str, folder: Path) -> tuple[Any, list[str]]:
    """The family's tiny pipeline on the device, with guidance where it has any; and prompts that it knows."""
    tiny = importlib.import_module(f"tests.oracles.families.{name}")
    tiny.build().save_pretrained(folder)
    settings = {"component": name, "path": str(folder), "steps": STEPS, "device": DEVICE} | getattr(
        tiny, "SETTINGS", {}
    )
    if hasattr(describe(settings, "prior").construct(), "guidance"):
        settings |= {"guidance": 2.0}
    return build(settings, "prior"), list(getattr(tiny, "PROMPTS", ("a cat", "a big red dog")))[:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_drawn_scored_trained_and_decoded(name: str, tmp_path: Path) -> None:
    prior, prompts = prior_of(name, tmp_path / "model")
    prior.attach(rank=2, alpha=2.0, seed=1)
    prompts = (prompts * 2)[:2]
    prior.arguments(prompts)  # encodes them
    with counted() as drawing:
        drawn = rollout(prior, prompts, [1, 2])
    assert drawn.x.device == torch.device(DEVICE)
    with counted() as scoring:
        assert torch.equal(score(prior, prompts, drawn), drawn.log_prob)
    # Besides what the pipeline and its network wait for by themselves.
    assert sum(n for line, n in drawing.waits.items() if "pipe(**call)" not in line) <= STEPS + 4, drawing.waits
    assert sum(n for line, n in scoring.waits.items() if "run(**" not in line) <= STEPS + 8, scoring.waits
    ones = torch.ones_like(drawn.log_prob)
    replay_backward(prior.pipe, drawn, ones, dtype=torch.float64, entry=entry_of(prior), call=prior.arguments(prompts))
    gradients = [parameter.grad for parameter in prior.parameters().values()]
    assert all(g is not None and g.device == torch.device(DEVICE) for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    seen = prior.decode(drawn.x_0)
    assert seen.device == torch.device(DEVICE)
    assert seen.isfinite().all()
    prior.export(tmp_path / "lora", "a card")
    assert list((tmp_path / "lora").glob("*.safetensors"))
