"""Paired differences, quantiles, and what re-weighted prior samples say, with intervals, against numpy and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.bootstrap import bootstrap_interval, quantile_intervals, reweighted_interval
from diffusion_rtb.evaluation.metrics.kl import exact_kl
from diffusion_rtb.evaluation.metrics.reward import QUANTILES, RewardMetric, paired_difference
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.sampling.sampler import occurrences

CONFIG = EvalConfig(bootstrap=300)
PROMPT = torch.arange(2).repeat_interleave(60)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(reward: Tensor, prompt: Tensor = PROMPT) -> Drawn:
    zero = torch.zeros(len(reward), 1)
    return Drawn(prompt, reward, zero, zero, index=torch.tensor(occurrences(prompt.tolist()), dtype=torch.long))


def correlated(seed: int, rise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Rewards that share 99 % of their variance, 120 of each, of two prompts far apart."""
    before = normal(120, 2 * seed) + 10.0 * PROMPT
    return before, before + rise + 0.1 * normal(120, 2 * seed + 1)


def test_a_paired_interval_is_much_narrower_than_two() -> None:
    before, after = correlated(0)
    found, pairs = paired_difference(side(before), side(after), 0.95, 1000)
    assert pairs == 60
    assert found.mean == pytest.approx(float((after - before).mean()))
    half = 1.96 * 0.1 / math.sqrt(120)  # the noise that is not shared
    assert found.high - found.low == pytest.approx(2 * half, rel=0.25)
    apart = [bootstrap_interval(reward, groups=PROMPT) for reward in (before, after)]
    both = math.hypot(*(each.high - each.low for each in apart))
    assert found.high - found.low < both / 8


def test_a_paired_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(120):
        before, after = correlated(seed)
        found, _ = paired_difference(side(before), side(after), 0.9, 200)
        hits += found.low <= 0.3 <= found.high
    # 120 trials of 0.9 have a standard deviation of 3.3; the bootstrap at n = 120 is half a percent short.
    assert 97 <= hits <= 117


def test_pairs_are_the_first_of_each_prompt_on_the_shorter_side() -> None:
    prior = side(torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]), torch.tensor([0, 0, 0, 1, 1]))
    posterior = side(torch.tensor([1.5, 2.5, 12.0, 22.0, 99.0]), torch.tensor([0, 0, 1, 1, 1]))
    found, pairs = paired_difference(prior, posterior, 0.95, 50)
    assert (found.mean, pairs) == ((0.5 + 2.0) / 2, 2)
    with pytest.raises(ValueError, match="samples of the same prompts and indices on both sides"):
        paired_difference(side(torch.ones(2), torch.tensor([3, 3])), side(torch.ones(1), torch.tensor([4])), 0.9, 5)


@pytest.mark.parametrize("weighted", [False, True])
def test_quantiles_are_numpys(weighted: bool) -> None:
    values, log_w = normal(200), normal(200, 1)
    prompt = torch.arange(2).repeat_interleave(100)
    found = quantile_intervals(values, QUANTILES, 0.9, 20, groups=prompt, log_w=log_w if weighted else None)
    for share, each in zip(QUANTILES, found, strict=True):
        by_numpy = [
            np.quantile(
                values[prompt == row].numpy(),
                share,
                method="inverted_cdf",
                weights=log_w[prompt == row].exp().numpy() if weighted else None,
            )
            for row in (0, 1)
        ]
        assert each.mean == pytest.approx(float(np.mean(by_numpy)))
        assert each.low <= each.high


def test_quantile_intervals_hold_the_truth_as_often_as_they_say() -> None:
    prompt, hits = torch.zeros(120, dtype=torch.long), 0
    for seed in range(150):
        (found,) = quantile_intervals(normal(120, seed), [0.75], 0.9, 150, groups=prompt)
        hits += found.low <= float(Normal(0.0, 1.0).icdf(torch.tensor(0.75))) <= found.high
    # 150 trials of 0.9: a standard deviation of 3.7.
    assert 121 <= hits <= 149


def test_reweighted_intervals_hold_the_closed_forms_as_often_as_they_say() -> None:
    """r ~ N(0, 1) of the prior: the posterior's is N(beta, 1), and its KL beta²/2."""
    beta, prompt, hits = 0.7, torch.zeros(200, dtype=torch.long), [0, 0]
    for seed in range(150):
        r = normal(200, seed)
        mean, nats = reweighted_interval(r, beta * r, 0.9, 150, groups=prompt), exact_kl(r, beta, prompt, 0.9, 150)
        hits[0] += mean.low <= beta <= mean.high
        hits[1] += nats.low <= beta**2 / 2 <= nats.high
    # A standard deviation of 3.7, and 3 % short: weights are skewed, 120 of 200 samples count.
    assert all(118 <= found <= 147 for found in hits)


def test_intervals_of_what_one_sample_carries_stay_finite() -> None:
    r = torch.tensor([0.0, 0.0, 800.0])
    found = reweighted_interval(r, r, 0.9, 50, groups=torch.zeros(3, dtype=torch.long))
    assert found.mean == pytest.approx(800.0)
    assert math.isfinite(found.low)
    assert math.isfinite(exact_kl(r, 1.0, torch.zeros(3, dtype=torch.long), 0.9, 50).low)


def test_the_metric_has_all_sides_and_says_the_difference() -> None:
    before, after = correlated(3)
    found = RewardMetric().of(side(before), side(after), 0.5, CONFIG)
    assert set(found["quantiles"]) == {"prior", "posterior", "reweighted_prior"}
    assert [float(share) for share in found["quantiles"]["posterior"]] == list(QUANTILES)
    assert found["prior"]["mean"] < found["reweighted_prior"]["mean"]
    assert found["paired_difference"]["pairs"] == 60
    assert RewardMetric().sentence(found, 0.5).startswith("Reward higher by 0.3")
    assert found["quantiles"]["reweighted_prior"]["0.5"]["mean"] > found["quantiles"]["prior"]["0.5"]["mean"]


def test_without_a_prior_or_a_beta_their_sides_are_missing() -> None:
    before, after = correlated(4)
    nobody = side(before[:0], PROMPT[:0])
    alone = RewardMetric().of(nobody, side(after), 1.0, CONFIG)
    assert (alone["prior"], alone["reweighted_prior"], alone["rise_in_prior_std"]) == (None, None, None)
    assert RewardMetric().sentence(alone, 1.0) == ""
    elsewhere = RewardMetric().of(replace(side(before), index=None), side(after), 1.0, CONFIG)
    assert elsewhere["paired_difference"] is None, "nobody knows the noise"
    unasked = RewardMetric().of(side(before), side(after), math.nan, CONFIG)
    assert unasked["reweighted_prior"] is None
    assert unasked["paired_difference"]["mean"] == pytest.approx(0.3, abs=0.05)


def test_constant_rewards_have_no_spread_and_no_rise() -> None:
    found = RewardMetric().of(side(torch.full((120,), 0.1)), side(torch.full((120,), 0.1)), 1.0, CONFIG)
    assert found["rise_in_within_prompt_std"] is None or found["rise_in_within_prompt_std"] == 0
    assert found["paired_difference"]["mean"] == found["paired_difference"]["high"] == 0


def test_nan_is_refused() -> None:
    bad = normal(120)
    bad[7] = math.nan
    with pytest.raises(ValueError, match=r"NaN at rows \[7\]"):
        RewardMetric().of(side(bad), side(normal(120)), 1.0, CONFIG)
    with pytest.raises(ValueError, match=r"NaN at rows \[7\]"):
        RewardMetric().of(side(normal(120)), side(bad), 1.0, CONFIG)
