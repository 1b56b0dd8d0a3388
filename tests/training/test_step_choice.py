"""Steps drawn by the size of their gradients: unbiased, with less variance where sizes differ, and part of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.sections import TrainConfig
from diffusion_rtb.objectives.ram import RAM
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.regression import Regression
from diffusion_rtb.training.updates.step_choice import FLOOR, StepChoice, included, stratified
from tests.oracles.behaving import differing, gradient_of, run, state

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

DENSE = [0, 1, 3, 4, 6, 7]


def seen(choice: StepChoice, sizes: dict[int, float]) -> None:
    """Gradients of these lengths, each taken of two samples and with a factor of 3."""
    for step, size in sizes.items():
        parameter = torch.nn.Parameter(torch.zeros(4))
        with choice.watching([parameter]):
            (6 * size / 2 * parameter.sum()).backward()
            choice.note(step, 6.0)


def knowing(*sizes: float) -> StepChoice:
    """One that has seen gradients of these lengths at DENSE."""
    choice = StepChoice()
    choice.chosen(DENSE, 2, 1, 0)
    seen(choice, dict(zip(DENSE, sizes, strict=True)))
    choice.settle(lambda given: given)
    return choice


def test_chances_sum_to_the_count_and_none_is_above_1() -> None:
    share = torch.tensor([0.7, 0.1, 0.1, 0.06, 0.04], dtype=torch.float64)
    found = included(share, 3)
    torch.testing.assert_close(found, torch.tensor([1.0, 2 / 3, 2 / 3, 0.4, 4 / 15], dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), (9.0, 0.1, 3.0, 0.0, 1.0, 1.0)])
def test_each_step_comes_as_often_as_its_factor_says(sizes: tuple[float, ...]) -> None:
    """E[sum of factors·g] = mean of g·count over the steps, for any g: so for each step alone."""
    choice, draws, count = knowing(*sizes), 3000, 3
    came = torch.zeros(draws, len(DENSE), dtype=torch.float64)
    for seed in range(draws // 3):
        for m, chosen in enumerate(choice.chosen(DENSE, count, 3, seed)):
            assert len(chosen) == count
            for step, factor in chosen.items():
                came[3 * seed + m, DENSE.index(step)] = factor * len(DENSE) / count
    error = came.std(0) / draws**0.5
    assert bool(((came.mean(0) - 1).abs() <= 4.5 * error + 1e-9).all())
    assert float(came.max()) <= len(DENSE) / (FLOOR * count) + 1e-9


def test_until_each_step_was_seen_all_are_alike() -> None:
    choice = StepChoice()
    assert choice.chosen(DENSE, 2, 3, 5) == stratified(DENSE, 2, 3, 5)
    seen(choice, {0: 1.0})
    choice.settle(lambda given: given)
    assert choice.chosen(DENSE, 2, 3, 5) == stratified(DENSE, 2, 3, 5)


PRIOR = {"component": "gaussian", "mean": [1.0, -2.0], "covariance": [[2.0, 0.6], [0.6, 0.5]], "steps": 6}


def tilting(out: Path, **train: Any) -> Trainer:
    sizes = {"group": 16, "micro_batch": 8, "gradient_steps": 2, "step_choice": "importance", "checkpoint_every": 2}
    objective = {"component": "ram", "stages": 1, "length": 2}
    return run(out, objective=objective, prior=PRIOR, beta=0.6, train=sizes | {"lr": 0.05} | train)


class Fixed(RAM):
    """Learns from the states of its batch as they are, so that steps are all that an update draws."""

    noises = False

    def __init__(self) -> None:
        super().__init__()
        self.reads_bounds = False

    def weights(self, samples: Any, beta: float) -> Tensor:
        return samples.reward.double() - samples.reward.double().mean()

    def aim(self, at: Any, beta: float) -> Tensor:
        return at.means["prior"] + 0.1 * at.weight.to(at.mean_q)[:, None]


def test_the_gradient_is_that_of_all_steps_on_average(tmp_path: Path) -> None:
    """On fixed states an update is the sum of its steps' own gradients with their factors, of which all at once are the oracle."""
    trainer, choice, objective = tilting(tmp_path), StepChoice(), Fixed()
    sampler, steps, draws = trainer.sampler, 6, 4000
    part = sampler.draw([0] * 8, list(range(8)))

    def gradient(count: int | None, seed: int, chosen: StepChoice | None, only: int | None = None) -> Tensor:
        weights = None if only is None else [float(i == only) for i in range(steps)]
        networks = {"prior": trainer.prior.as_prior}
        Regression(sampler, objective, 1.0, networks, weights=weights, choice=chosen).push({"own": part}, count, seed)
        return gradient_of(trainer.prior).double()

    own = torch.stack([gradient(None, 0, None, only) for only in range(steps)])
    whole = gradient(None, 0, choice)
    torch.testing.assert_close(own.sum(0), whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)
    choice.settle(lambda given: given)
    torch.testing.assert_close(choice.squares, own.square().sum(1), rtol=1e-5, atol=0)
    assert float(own.norm(dim=1).max() / own.norm(dim=1).min()) > 2  # or there would be nothing to choose by

    def of(chosen: Mapping[int, float]) -> Tensor:
        return steps / 2 * torch.stack([own[step] * factor for step, factor in chosen.items()]).sum(0)

    for seed in range(3):
        (chosen,) = choice.chosen(range(steps), 2, 1, seed)
        rounding = 1e-5 * float(whole.abs().max())  # of float32
        torch.testing.assert_close(gradient(2, seed, choice), of(chosen), atol=rounding, rtol=1e-4)
    spread = {}
    for name, draw in (("stratified", stratified), ("importance", choice.chosen)):
        rows = torch.stack([of(draw(range(steps), 2, 1, seed)[0]) for seed in range(draws)])
        error = rows.std(0) / draws**0.5
        assert bool(((rows.mean(0) - whole).abs() <= 4.5 * error + 1e-9).all())
        spread[name] = float((rows - whole).square().sum(1).mean())
    assert spread["importance"] < 0.9 * spread["stratified"]


def test_a_run_goes_on_from_what_it_had_seen(tmp_path: Path) -> None:
    whole = tilting(tmp_path / "whole", iterations=6)
    whole.fit()
    tilting(tmp_path / "parts", iterations=4).fit()
    resumed = tilting(tmp_path / "parts", iterations=6)
    resumed.fit()
    assert "steps.squares" in state(whole)
    assert differing(state(whole), state(resumed)) == []


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set gradient_steps"):
        TrainConfig(step_choice="importance")
    with pytest.raises(ValueError, match="rtb is none: set it to stratified"):
        run(
            tmp_path,
            prior=PRIOR,
            objective={"component": "rtb"},
            train={"step_choice": "importance", "gradient_steps": 2},
        )
