"""What behaviours will remember is computed beforehand, as the tensors come out, and refused where it cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.behaviours._stored_size import stores
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.training.assemble import assemble
from tests.config.test_prompt_metadata import named, without
from tests.oracles.tiny import save_tiny

VECTORS = {"component": "gaussian", "mean": [1.0, -2.0], "covariance": [[2.0, 0.6], [0.6, 0.5]], "steps": 20}
EACH = (20 + 1) * 2 * 4 + 20 * 24
"""Bytes of a trajectory of two float32 numbers over 20 steps, with three float64 log-densities a step."""


def run_config(out: Path, prompts: int, **more: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "stored", "out": str(out), "beta": 0.1, "prior": VECTORS,
        "reward": {"component": "density", "density": {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}},
        "prompts": {"list": [f"p {i}" for i in range(prompts)]},
        "train": {"iterations": 2, "prompts_per_iteration": 2, "group": 4, "micro_batch": 8, "grid_every": 0},
    }  # fmt: skip
    return RunConfig.model_validate(data | more)


def test_the_arithmetic_is_that_of_the_tensors(tmp_path: Path) -> None:
    prior = {"component": "stable_diffusion", "path": str(save_tiny(tmp_path / "prior")), "steps": 4, "device": "cpu"}
    behaviour = [
        {"component": "prior_buffer", "share": 0.25, "capacity": 16},
        {"component": "replay", "share": 0.25, "capacity": 2},
        {"component": "back_and_forth", "share": 0.25, "pool": 3},
    ]
    train = {"iterations": 3, "prompts_per_iteration": 3, "group": 4, "micro_batch": 12, "grid_every": 0}
    trainer = assemble(run_config(tmp_path, 3, prior=prior, reward=named(without), behaviours=behaviour, train=train))
    for _ in range(3):
        trainer.step()
        trainer.iteration += 1
    found = stores(trainer.config, trainer.prior, trainer.objective, trainer.sources)
    for store, name in zip(found, ("prior", "replay", "back_and_forth"), strict=True):
        held = trainer.sources[name][0].tensors()
        assert store.prompts == 3
        assert sum(tensor.nbytes for tensor in held.values()) == pytest.approx(store.size, rel=0.05), name


def test_prompts_without_a_turn_are_stored_only_by_a_warm_up(tmp_path: Path) -> None:
    behaviour = [{"component": "prior_buffer", "share": 0.5, "capacity": 8}]
    trainer = assemble(run_config(tmp_path, 50, behaviours=behaviour))
    (store,) = stores(trainer.config, trainer.prior, trainer.objective, trainer.sources)
    assert (store.prompts, store.each, store.size) == (4, EACH, 4 * 8 * EACH)
    objective = {"component": "trust_pcl", "length": 4}
    trainer = assemble(run_config(tmp_path, 50, behaviours=behaviour, objective=objective, name="warmed"))
    (store,) = stores(trainer.config, trainer.prior, trainer.objective, trainer.sources)
    assert store.prompts == 50


@pytest.mark.parametrize(
    "behaviour, expected",
    [
        (
            [{"component": "prior_buffer", "share": 0.5, "capacity": 10**12}],
            r"capacity of prior_buffer keeps up to 1000000000000 trajectories of 1 kB for each of 4 prompts: .* in all\. It is "
            r"held twice while a checkpoint is written, and .* GB of memory are free\. Lower capacity of prior_buffer to \d+, or",
        ),
        (
            [
                {"component": "prior_buffer", "share": 0.25, "capacity": 4},
                {"component": "replay", "share": 0.5, "capacity": 10**12},
            ],
            r"keeps up to 4 .*; capacity of replay keeps up to .*Lower capacity of replay to \d+, or",
        ),
        ([{"component": "back_and_forth", "share": 0.5, "pool": 10**15}], r"Lower pool of back_and_forth to \d+"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(
    tmp_path: Path, behaviour: list[dict[str, Any]], expected: str
) -> None:
    train = {"iterations": 10**12, "prompts_per_iteration": 2, "group": 4, "micro_batch": 8, "grid_every": 0}
    with pytest.raises(ValueError, match=expected):
        assemble(run_config(tmp_path, 4, behaviours=behaviour, train=train))


def test_a_large_bound_that_no_run_reaches_is_no_reason(tmp_path: Path) -> None:
    behaviour = [
        {"component": "replay", "share": 0.5, "capacity": 10**12},
        {"component": "back_and_forth", "share": 0.25, "pool": 10**15},
    ]
    trainer = assemble(run_config(tmp_path, 4, behaviours=behaviour))
    replay, back = stores(trainer.config, trainer.prior, trainer.objective, trainer.sources)
    # Two iterations of two prompts, each with one trajectory of the posterior's own and one noised back.
    assert (replay.size, back.size) == (4 * EACH, 8 * 2 * 4)
