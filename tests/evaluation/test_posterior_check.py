"""The check passes for the exact posterior, fails for a biased one, and its intervals hold as often as they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.evaluation.metrics.posterior_check import PosteriorCheck, check_posterior

STYLES = ("3d", "flat", "photo", "sketch")
P = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
"""Class shares of the prior for two prompts."""
BETA_R = torch.tensor([0.0, 1.0, -0.5, 0.5], dtype=torch.float64)
"""beta·r of a picture of each class, nats."""
EXACT = (P * BETA_R.exp()) / (P * BETA_R.exp()).sum(1, keepdim=True)


def drawn(shares: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """`each` classes of each prompt, and the prompts, from the global generator."""
    return torch.multinomial(shares, each, replacement=True).flatten(), torch.arange(len(shares)).repeat_interleave(
        each
    )


def check(
    posterior: Tensor, each: int = 1000, bootstrap: int = 300, tolerance: float = 0.1, missing_above: float = 0.05
) -> PosteriorCheck:
    prior = drawn(P, each)
    return check_posterior(
        "style",
        STYLES,
        prior=prior,
        log_w=BETA_R[prior[0]],
        posterior=drawn(posterior, each),
        bootstrap=bootstrap,
        tolerance=tolerance,
        missing_above=missing_above,
    )


def test_the_exact_posterior_passes() -> None:
    found = check(EXACT)
    torch.testing.assert_close(torch.tensor(found.reweighted), EXACT.mean(0).float(), atol=0.04, rtol=0)
    torch.testing.assert_close(torch.tensor(found.prior), P.mean(0).float(), atol=0.04, rtol=0)
    assert found.passed
    assert found.tv.low == 0.0
    assert found.noise.low <= found.tv.mean <= found.noise.high
    assert found.p_value > 0.05
    assert found.missing == ()


def test_the_prior_does_not_pass_for_the_posterior() -> None:
    found = check(P)
    truth = 0.5 * float((P - EXACT).mean(0).abs().sum())
    assert truth > 0.15
    assert not found.passed
    assert found.p_value == pytest.approx(1 / 301)
    assert found.tv.low > 0.0
    assert found.tv.low <= truth <= found.tv.high
    assert found.tv_prior == pytest.approx(truth, abs=0.05)


def test_a_lost_class_fails_whatever_the_distance() -> None:
    without = EXACT.clone()
    without[:, 3] = 0.0
    found = check(without / without.sum(1, keepdim=True), tolerance=1.0)
    assert found.missing == ("sketch",)
    assert not found.passed
    assert check(without, tolerance=1.0, missing_above=0.9).passed


def test_errors_of_opposite_sign_show_within_prompts() -> None:
    # The mean over prompts is exact, each prompt is not.
    shift = torch.tensor([[0.1, -0.1, 0.0, 0.0], [-0.1, 0.1, 0.0, 0.0]])
    found = check(EXACT + shift, each=4000)
    assert found.tv.mean < 0.03
    assert found.tv_within == pytest.approx(0.1, abs=0.03)
    assert found.noise_within < 0.03


def test_literal_shares_and_distance() -> None:
    found = check_posterior(
        "colour",
        ("red", "blue"),
        prior=(torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.long)),
        log_w=torch.tensor([0.0, 0.0, 0.0, math.log(3.0)]),
        posterior=(torch.tensor([0, 1, 1, 1]), torch.zeros(4, dtype=torch.long)),
    )
    assert found.prior == (0.75, 0.25)
    assert found.reweighted == pytest.approx((0.5, 0.5))
    assert found.posterior == (0.25, 0.75)
    assert found.tv.mean == pytest.approx(0.25)
    assert found.tv_within == pytest.approx(0.25)
    assert found.tv_prior == pytest.approx(0.25)


@pytest.mark.parametrize("posterior", [EXACT, P], ids=["exact", "prior"])
def test_the_interval_holds_the_true_distance(posterior: Tensor) -> None:
    truth = 0.5 * float((posterior - EXACT).mean(0).abs().sum())
    intervals = [check(posterior, each=150, bootstrap=200).tv for _ in range(60)]
    # 95 % intervals that err on the large side: at most 6 of 60 may miss (expected 3, standard deviation 1.7).
    assert sum(i.low <= truth <= i.high for i in intervals) >= 54


def test_p_values_of_the_exact_posterior_are_not_small() -> None:
    values = [check(EXACT, each=150, bootstrap=200).p_value for _ in range(60)]
    # Uniform when the noise is estimated right: 6 of 60 below 0.1, standard deviation 2.3.
    assert sum(v < 0.1 for v in values) <= 13
    assert sum(v > 0.5 for v in values) >= 18


def test_the_same_seed_gives_the_same_answer_and_moves_no_other() -> None:
    prior, posterior = drawn(P, 50), drawn(EXACT, 50)
    arguments: dict[str, Any] = {"prior": prior, "log_w": BETA_R[prior[0]], "posterior": posterior}
    state = torch.get_rng_state()
    assert check_posterior("style", STYLES, **arguments) == check_posterior("style", STYLES, **arguments)
    assert torch.equal(state, torch.get_rng_state())


def test_one_sample_carrying_all_weight_is_survived() -> None:
    found = check_posterior(
        "style",
        STYLES,
        prior=(torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.long)),
        log_w=torch.tensor([0.0, 0.0, 0.0, 5000.0]),
        posterior=(torch.tensor([3, 3]), torch.zeros(2, dtype=torch.long)),
    )
    assert found.tv.mean == 0.0
    assert 0.0 <= found.noise.mean <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"posterior": (torch.tensor([0]), torch.tensor([7]))}, r"same prompts, got rows \[0\] and \[7\]"),
        ({"confidence": 0.0}, "between 0 and 1"),
        ({"prior": (torch.tensor([4]), torch.tensor([0]))}, "0 … 3, got 4"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    one = (torch.tensor([0]), torch.tensor([0]))
    given: dict[str, Any] = {"prior": one, "log_w": torch.zeros(1), "posterior": one} | arguments
    with pytest.raises(ValueError, match=message):
        check_posterior("style", STYLES, **given)
