"""Where the bill goes: against the closed form of a Gaussian chain, per step and in all; and the tables of sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.metrics.bill import Bill, last_steps
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.evaluation.side_tables import side_tables
from diffusion_rtb.sampling.exact_profile import exact_profile
from diffusion_rtb.sampling.sampler import Sampler
from pipelines._analytic.linear_gaussian import kl
from tests.evaluation.test_report import METRICS
from tests.oracles.behaving import BETA, QUADRATIC, known, run
from tests.oracles.pixel import PixelPrior, green

CONFIG = EvalConfig(bootstrap=20)


def test_the_exact_posterior_pays_step_by_step_what_the_closed_form_says(tmp_path: Path) -> None:
    trainer = run(tmp_path, reward=QUADRATIC, prior={"dtype": "float64"})
    trainer.sampler.micro_batch = 2000
    found = exact_profile(trainer.sampler, BETA, [0] * 2000, list(range(2000)))
    assert found is not None
    tilt = known(trainer)
    expected = kl(tilt.best, tilt.p)
    # A step of k nats has a variance of about 2·k.
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * float((2 * expected.max() / 2000).sqrt()))


def test_nobody_knows_it_of_other_priors_and_rewards(tmp_path: Path) -> None:
    assert exact_profile(Sampler(PixelPrior(), green, ["a"], 2), 1.0, [0, 0], [0, 1]) is None
    trainer = run(tmp_path)
    trainer.sampler.reward = lambda images, prompts: images[:, 0]
    assert exact_profile(trainer.sampler, BETA, [0, 0], [0, 1]) is None


def posterior(per_step: list[float], exact: list[float] | None = None) -> Drawn:
    """Two samples, both with this log q - log p."""
    log_q = torch.tensor([per_step, per_step], dtype=torch.float64)
    known_of = None if exact is None else torch.tensor(exact)
    rows = torch.zeros(2, dtype=torch.long)
    return Drawn(rows, torch.tensor([0.0, 1.0]), log_q, torch.zeros_like(log_q), exact_profile=known_of)


def test_the_bill_is_split() -> None:
    bill = posterior([0.5] * 8 + [2.0, 1.0], [0.1] * 10)
    found = Bill().of(bill, bill, 1.0, CONFIG)
    needed = 1.0 / (1 + torch.e**-1) - torch.log(torch.tensor((1 + torch.e) / 2)).item()  # of rewards 0 and 1
    assert found["paid"] == pytest.approx(7.0)
    assert found["needed"] == pytest.approx(needed)
    assert found["rest"] == pytest.approx(7.0 - needed)
    assert (found["last_steps"], found["last_share"]) == (2, pytest.approx(3 / 7))
    assert found["exact_last_share"] == pytest.approx(0.2)
    assert Bill().sentence(found, 1.0) == (
        f"Pays 7 nats where {needed:.3g} would do; 43% of it in the last 2 of 10 steps, where the exact posterior has 20%."
    )
    assert bill.of(0).exact_profile is bill.exact_profile


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (2, 1), (4, 1), (20, 4), (50, 10)])
def test_the_last_steps_are_a_fifth(steps: int, last: int) -> None:
    assert last_steps(steps) == last


@pytest.mark.parametrize("width", [60, 80, 120])
def test_sides_are_rows_that_fit_the_terminal(width: int) -> None:
    many = {"mean": -123.456, "low": -200.0, "high": -100.0}
    sides = {"prior": many, "posterior": many, "reweighted_prior": many}
    overall = {
        "reward": sides,
        "kl": many | {"reweighted_prior": many},
        "ess": {"prior": 0.25, "posterior": 1.0},
        "elbo": 2.5,
        "diversity": {side: {"pairwise_cosine_distance": 0.5, "vendi": 3.0, "lgmd": -1.0} for side in sides},
    }
    numbers = {"beta": 2.0, "samples": {"prior": 40, "posterior": 10}, "overall": overall}
    console = Console(width=width)
    with console.capture() as captured:
        for table in side_tables(numbers, METRICS, width):
            console.print(table)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in captured.get()
    assert sum("ESS 10 of 40" in line for line in lines) == sum("All prompts, beta 2" in line for line in lines)
    assert captured.get().count("[-200, -100]") == 3 + 2  # reward of each side; KL, which is 0 for the prior
