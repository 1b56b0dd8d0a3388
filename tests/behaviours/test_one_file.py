"""A behaviour is one file: dropped into a package, it is found by name or path, trains, is refused where it must, and resumes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.config import components
from tests.oracles.behaving import differing, rows, run, state

FILE = '''"""Trajectories of the prior, drawn anew in every iteration."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor

from diffusion_rtb.behaviours import Share, Source
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["FreshPrior"]


class FreshPrior(Source):
    """Counts its draws, so that it has something to remember."""

    name = "fresh"
    remembers = "take it out"

    def __init__(self, share: Share, step: PositiveInt = 1) -> None:
        self.share, self.step, self.draws = share, step, 0

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        pairs = numbered(rows, count)
        seeds = [seed_of(self.seed, "fresh", self.draws, *pair) for pair in pairs]
        return sampler.draw([row for row, _ in pairs], seeds, of_prior=True)

    def settle(self, parts: Mapping[str, Batch]) -> None:
        assert len(parts["posterior"]) == 3 * len(parts[self.name]), "three quarters are left to the posterior"
        self.draws += self.step

    def tensors(self) -> dict[str, Tensor]:
        return {"draws": torch.tensor(self.draws)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.draws = int(tensors["draws"])
'''


@pytest.fixture(params=["by name", "by path"])
def component(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    package = tmp_path / "their_shelf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fresh_prior.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(components, "_SHELVES", components._SHELVES | {"behaviour": "their_shelf"})  # type: ignore[operator]
    yield "fresh_prior" if request.param == "by name" else "their_shelf.fresh_prior:FreshPrior"
    for name in [name for name in sys.modules if name.startswith("their_shelf")]:
        del sys.modules[name]


def listed(component: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"component": component, "share": 0.25, **settings}]


def test_a_dropped_file_trains_and_resumes(component: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", behaviours=listed(component, step=2), train={"iterations": 4})
    whole.fit()
    found = rows(whole)
    assert all("fresh_share_reward" in row for row in found)
    assert found[0]["fresh_share_reward"] != found[1]["fresh_share_reward"], "drawn anew"
    for iterations in (2, 4):
        parts = run(tmp_path / "parts", behaviours=listed(component, step=2), train={"iterations": iterations})
        parts.fit()
    assert rows(parts) == found
    assert differing(state(parts), state(whole)) == []
    assert int(state(whole)["source-fresh.draws"]) == 8


def test_what_it_says_of_itself_is_believed(component: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no argument .stp.\. Did you mean .step."):
        run(tmp_path, behaviours=listed(component, stp=2))
    with pytest.raises(ValueError, match=r"is on-policy.* behaviours FreshPrior"):
        run(tmp_path, behaviours=listed(component), objective={"component": "grpo"})
    weighted = {"component": "reinforce_kl", "importance": "exact"}
    assert run(tmp_path, behaviours=listed(component), objective=weighted), "its density is known"
