"""What is said of a prior's size before its weights load is what torch counts afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from diffusion_rtb.abilities import SizedAhead
from diffusion_rtb.files.completeness import tensor_shapes
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("rank", "targets"), [(8, None), (3, ["conv1", "time_emb_proj"]), (1, ["to_out.0"]), (2, ["proj_in", "linear_1"])]
)
def test_the_trained_numbers_are_known_before_the_weights(
    folder: Path, rank: int, targets: Sequence[str] | None
) -> None:
    prior = StableDiffusion(str(folder), steps=2)
    ahead = prior.trained_numbers(rank=rank, alpha=1.0, target_modules=targets)
    prior.attach(rank=rank, alpha=1.0, target_modules=targets)
    assert ahead == sum(parameter.numel() for parameter in prior.parameters().values())


def test_the_files_hold_what_the_networks_hold(folder: Path) -> None:
    prior = StableDiffusion(str(folder), steps=2)
    assert isinstance(prior, SizedAhead)
    for name, files in prior.weight_files().items():
        shapes = {key: tuple(value.shape) for key, value in getattr(prior.pipe, name).state_dict().items()}
        assert tensor_shapes(files) == shapes, name


def test_a_hub_id_says_nothing_ahead() -> None:
    prior = StableDiffusion("somebody/a-model", steps=2)
    assert prior.weight_files() == {}
    assert prior.trained_numbers(rank=8) == 0
