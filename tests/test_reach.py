"""What the prior's samples say of a target."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.load import load_config
from diffusion_rtb.estimates import ess
from diffusion_rtb.reach import FEW, doubts
from diffusion_rtb.training.assemble import assemble

N = 4096


def normal(sd: float, rows: int = 1, n: int = N) -> tuple[Tensor, Tensor]:
    """Rewards at the quantiles of a normal distribution, the same for each prompt."""
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (sd * torch.special.ndtri(at)).repeat(rows), torch.arange(rows).repeat_interleave(n)


def test_a_target_within_reach_is_in_no_doubt() -> None:
    reward, prompt = normal(1.0, 3)
    assert doubts(reward, prompt, ["a", "b", "c"], 1.5) == []


def test_a_beta_too_far_is_answered_with_the_one_that_fits() -> None:
    reward, prompt = normal(0.5, 2)
    (said,) = doubts(reward, prompt, ["a cat", "a dog"], 9.0)
    fits = float(said.split("beta=")[1].split(":")[0])
    assert N * ess(1.1 * fits * reward[:N]) < FEW <= N * ess(fits * reward[:N])
    assert "'a cat'" in said
    assert "2 such prompts out of 2" in said
    assert f"of {N} samples" in said


def test_a_beta_that_fits_all_prompts_is_the_smallest() -> None:
    wide, narrow = normal(2.0)[0], normal(0.5)[0]
    reward, prompt = torch.cat([narrow, wide]), torch.tensor([0, 1]).repeat_interleave(N)
    (said,) = doubts(reward, prompt, ["narrow", "wide"], 3.0)
    assert "'wide'" in said
    assert "such prompts" not in said
    fits = float(said.split("beta=")[1].split(":")[0])
    assert N * ess(1.1 * fits * wide) < FEW <= N * ess(fits * wide)


def test_next_to_nothing_is_answered_with_the_beta_of_one_nat() -> None:
    reward, prompt = normal(0.01)
    (said,) = doubts(reward + 7, prompt, ["a"], 2.0)
    assert "beta=1e+02" in said
    assert "0.02 nats" in said


def test_a_constant_reward_has_no_beta() -> None:
    (said,) = doubts(torch.full((8,), 0.25), torch.zeros(8, dtype=torch.long), ["a"], 2.0)
    assert "0.25 for each of 8 samples" in said
    assert "beta=" not in said


@pytest.mark.parametrize("beta", [2.0, None])
def test_too_few_samples_are_not_judged(beta: float | None) -> None:
    assert doubts(torch.tensor([3.0]), torch.tensor([0]), ["a"], beta) == []
    spread = torch.tensor([0.0, 100.0] * 8)
    assert doubts(spread, torch.zeros(16, dtype=torch.long), ["a"], beta) == []


def test_without_a_beta_only_what_never_fits_is_said() -> None:
    reward, prompt = normal(0.001)
    assert doubts(reward, prompt, ["a"], None) == []


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["behaviours=[{component: prior_buffer, share: 0.5, capacity: 64}]"],
        [
            "objective={component: trust_pcl, length: 1, warm_up_updates: 2}",
            "behaviours=[{component: prior_buffer, capacity: 64}]",
        ],
    ],
)
def test_a_run_says_it_once_and_before_it_learns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: list[str]
) -> None:
    config = load_config(
        Path("configs/gaussian.yaml"),
        [*changes, "beta=500", "train.iterations=2", "train.group=64", "train.micro_batch=64", f"out={tmp_path}"],
    )
    trainer = assemble(config)
    before = [parameter.detach().clone() for parameter in trainer.prior.parameters().values()]
    unchanged: list[bool] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            after = trainer.prior.parameters().values()
            unchanged.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    handler = Heard(logging.WARNING)
    logging.getLogger("diffusion_rtb.reach").addHandler(handler)
    try:
        trainer.fit()
    finally:
        logging.getLogger("diffusion_rtb.reach").removeHandler(handler)
    assert unchanged == [True]
    assert "of 64 samples of the prior count" in caplog.text
