"""One new file on a shelf is enough: it is found by its name, its settings are checked, and a config trains with it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.config import components
from diffusion_rtb.config.sections import RunConfig
from diffusion_rtb.training.assemble import assemble, check_run

FILES = {
    "objective": '''
from diffusion_rtb.interfaces import Loss

__all__ = ["PlainRTB"]

class PlainRTB:
    """1/2 (mean log w - log w)², as it is written down."""

    smallest_group = 2

    def __init__(self, strength: float = 1.0) -> None:
        if strength <= 0:
            raise ValueError(f"strength is {strength}: it must be positive.")
        self.strength = strength

    def prepare(self, prompts, dims, features):
        pass

    def state_dict(self):
        return {}

    def __call__(self, terms, beta):
        log_w = beta * terms.reward - (terms.log_q - terms.log_p).sum(1)
        log_z = log_w.detach().mean().expand_as(log_w)
        residual = log_z - log_w
        return Loss(self.strength * residual.square().mean() / 2, residual.detach(), log_z)
''',
    "reward": '''
from diffusion_rtb.abilities import TwoPhase

__all__ = ["Near"]

class Near(TwoPhase):
    """r(x) = -strength·|x - 1|²."""

    def __init__(self, strength: float = 1.0) -> None:
        if strength <= 0:
            raise ValueError(f"strength is {strength}: it must be positive.")
        self.strength = strength

    def __call__(self, images, prompts):
        return -self.strength * (images - 1).square().flatten(1).sum(1)
''',
}

BUNDLED = {
    "objective": {"component": "rtb", "log_z": "vargrad"},
    "reward": {"component": "density", "density": {"mean": [1.0, 1.0], "precision": 2.0}},
}


@pytest.fixture
def dropped(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Write the file of a kind into a folder that belongs to the kind's shelf."""
    shelves = []

    def drop(kind: str) -> None:
        (tmp_path / "brand_new.py").write_text(FILES[kind])
        shelf = importlib.import_module(components._SHELVES[kind])
        shelf.__path__.append(str(tmp_path))
        shelves.append(shelf)
        importlib.invalidate_caches()
        components._files.cache_clear()

    yield drop
    for shelf in shelves:
        shelf.__path__.remove(str(tmp_path))
    components._files.cache_clear()


def run(out: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "out": str(out),
            "prior": {"component": "gaussian", "steps": 3, "mean": [0.0, 0.0], "covariance": [1.0, 0.5]},
            "beta": 1.0,
            "prompts": {"list": [""]},
            "train": {"iterations": 2, "prompts_per_iteration": 1, "group": 8, "micro_batch": 8, "grid_every": 0},
            **BUNDLED,
            **changes,
        }
    )


def metrics(config: RunConfig) -> list[dict[str, float]]:
    assemble(config).fit()
    lines = (Path(config.out) / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]


@pytest.mark.parametrize("kind", FILES)
def test_a_file_on_the_shelf_is_all_that_it_takes(kind: Any, dropped: Callable[[str], None], tmp_path: Path) -> None:
    assert "brand_new" not in components.short_names(kind)
    dropped(kind)
    with pytest.raises(
        ValueError, match="'brand_new' has no argument 'strenght'. Did you mean 'strength'".replace(".", r"\.")
    ):
        check_run(run(tmp_path, **{kind: {"component": "brand_new", "strenght": 2.0}}), tmp_path)
    with pytest.raises(ValueError, match="it must be positive"):
        check_run(run(tmp_path, **{kind: {"component": "brand_new", "strength": -1}}), tmp_path)
    found = metrics(run(tmp_path / "new", **{kind: {"component": "brand_new"}}))
    for one, other in zip(found, metrics(run(tmp_path / "bundled")), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
