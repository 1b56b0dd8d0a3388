"""Preferences between noised samples: the published loss by autograd, its limit, the same noise for a pair, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_rtb.chain.forward_process import signal_and_noise
from diffusion_rtb.objectives.diffusion_dpo import DiffusionDPO
from diffusion_rtb.sampling.noising import noised_anew
from tests.oracles.behaving import LINEAR, run
from tests.oracles.states import states_of

STEPS, STD, BETA = 4, 0.7, 1.3


def batch() -> dict[str, Tensor]:
    """Two prompts, three samples and two."""
    mean_q, mean_p, mean_0 = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    reward = torch.tensor([0.3, -0.4, 0.3, 1.1, -2.0], dtype=torch.float64)
    return {"mean_q": mean_q, "mean_p": mean_p, "mean_0": mean_0, "reward": reward}


PROMPT = torch.tensor([0, 0, 0, 4, 4])
ALL, BEST = [(0, 1), (0, 2), (1, 2), (3, 4)], [(0, 1), (3, 4)]


def log_ratio(mean_q: Tensor, given: dict[str, Tensor]) -> Tensor:
    e_q, e_p = ((mean - given["mean_0"]).square().sum((1, 2)) / (2 * STD**2) for mean in (mean_q, given["mean_p"]))
    return STEPS * (e_p - e_q)


def pulled(objective: DiffusionDPO, given: dict[str, Tensor]) -> Tensor:
    """The gradient in the means that the engine takes of one step: mean over samples, sum over steps."""
    at = states_of(given["mean_q"], given["mean_p"], mean_0=given["mean_0"], reward=given["reward"], prompt=PROMPT)
    return (given["mean_q"] - objective.aim(at, BETA)) / STD**2 / len(PROMPT)


@pytest.mark.parametrize(("pairs", "chosen"), [("all", ALL), ("best_worst", BEST)])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_pull_is_the_gradient_of_the_published_loss(labels: Any, pairs: Any, chosen: list[tuple[int, int]]) -> None:
    given, slope = batch(), 0.3
    mean_q = given["mean_q"].clone().requires_grad_()
    ratio, r, loss = log_ratio(mean_q, given), given["reward"], torch.zeros((), dtype=torch.float64)
    for i, j in chosen:
        z, apart = slope * (ratio[i] - ratio[j]), r[i] - r[j]
        y = torch.sigmoid(slope * BETA * apart) if labels == "soft" else (torch.sign(apart) + 1) / 2
        share = 1 / 2 / sum(PROMPT[k] == PROMPT[i] for k, _ in chosen)
        loss = loss - share * (y * logsigmoid(z) + (1 - y) * logsigmoid(-z)) / STEPS
    (expected,) = torch.autograd.grad(loss, mean_q)
    torch.testing.assert_close(pulled(DiffusionDPO(labels, pairs, slope=slope), given), expected)
    assert float(expected.abs().max()) > 0.01


def test_small_slopes_are_a_regression_of_differences() -> None:
    given, slope = batch(), 1e-4
    mean_q = given["mean_q"].clone().requires_grad_()
    ratio, r = log_ratio(mean_q, given), given["reward"]
    squares = [(ratio[i] - ratio[j] - BETA * (r[i] - r[j])).square() / 2 for i, j in ALL]
    loss = (sum(squares[:3]) / 3 + squares[3]) / 2 / STEPS
    (expected,) = torch.autograd.grad(loss, mean_q)
    found = pulled(DiffusionDPO("soft", slope=slope), given) * 4 / slope**2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def training(out: Path, **sections: Any) -> Any:
    objective = {"component": "diffusion_dpo"} | sections.pop("objective", {})
    return run(out, reward=LINEAR, objective=objective, **sections)


def test_samples_of_a_prompt_have_the_same_noise(tmp_path: Path) -> None:
    trainer = training(tmp_path, prompts={"list": ["a", "b"]}, train={"micro_batch": 4})
    drawn = trainer.sampler.draw([0] * 6 + [1] * 6, list(range(12)))
    chain = noised_anew(trainer.sampler, drawn, 0, shared=True).trajectory
    a, b = signal_and_noise(trainer.prior.pipe.scheduler, chain.timesteps)
    last = (chain.x[:, 3] - a[3] * chain.x_0) / b[3]
    torch.testing.assert_close(last[:6], last[:1].expand(6, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(last[6:], last[6:7].expand(6, -1), atol=1e-4, rtol=0)
    assert float((last[0] - last[6]).abs().max()) > 0.1
    assert len({tuple(x) for x in chain.x_0.tolist()}) == 12


def test_it_learns_the_better_samples(tmp_path: Path, shapes_unchecked: None) -> None:
    sizes = {"iterations": 15, "group": 32, "micro_batch": 32, "lr": 0.05}
    trainer = training(tmp_path, objective={"labels": "soft", "slope": 0.1}, train=sizes)
    before = trainer.sampler.draw([0] * 32, list(range(32))).reward
    trainer.fit()
    after = trainer.sampler.draw([0] * 32, list(range(32))).reward
    assert float((after - before).mean()) > 0.2


@pytest.mark.parametrize(("group", "micro"), [(6, 4), (8, 1)])
def test_micro_batches_that_part_a_prompt_are_refused(group: int, micro: int, tmp_path: Path) -> None:
    sizes = {"prompts_per_iteration": 2, "group": group, "micro_batch": micro}
    with pytest.raises(ValueError, match=rf"train.micro_batch {micro} parts the {group} of OnPolicy unevenly.*rtb"):
        training(tmp_path, prompts={"list": ["a", "b"]}, train=sizes)
