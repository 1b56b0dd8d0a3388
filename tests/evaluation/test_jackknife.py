"""log Z from prior samples: normal rewards have log Z = m + s²/2, and the jackknife two definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion_rtb.evaluation.metrics.log_z import FEW, LogZ, log_z_with_error

BETA = 2.0


def of(values: Tensor, prompt: Tensor | None = None) -> LogZ:
    """Of beta·r = values."""
    return log_z_with_error(values / BETA, BETA, torch.zeros(len(values)).long() if prompt is None else prompt)


def draws(spread: float, samples: int, times: int) -> list[LogZ]:
    generator = torch.Generator().manual_seed(0)
    values = 1.0 + spread * torch.randn(times, samples, generator=generator, dtype=torch.float64)
    return [of(row) for row in values]


def test_it_is_the_jackknife() -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def statistic(v: Tensor) -> float:
        return math.log(sum(math.exp(x) for x in v.tolist()) / len(v))

    left_out = [statistic(torch.cat([values[:i], values[i + 1 :]])) for i in range(7)]
    mean, found = sum(left_out) / 7, of(values)
    assert found.estimate == pytest.approx(statistic(values))
    assert found.bias == pytest.approx(6 * (mean - statistic(values)))
    error = math.sqrt(6 / 7 * sum((x - mean) ** 2 for x in left_out))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)
    assert (found.high + found.low) / 2 == pytest.approx(found.estimate - found.bias)


@pytest.mark.parametrize(("spread", "samples"), [(0.5, 64), (1.0, 64), (1.0, 480), (1.5, 480)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread: float, samples: int) -> None:
    found = draws(spread, samples, 400)
    held = sum(one.low <= 1.0 + spread**2 / 2 <= one.high for one in found) / 400
    assert held > 0.95 - 0.03 - 3 * math.sqrt(0.95 * 0.05 / 400)  # normal theory is a little short of 64 samples


def test_it_errs_low_and_says_by_how_much() -> None:
    found = draws(1.0, 16, 2000)
    bias = sum(one.estimate for one in found) / 2000 - 1.5
    seen = sum(one.bias for one in found) / 2000
    assert bias < -0.04
    assert seen == pytest.approx(bias, abs=0.025)


def test_the_tail_that_is_not_seen_is_betrayed_by_the_effective_number() -> None:
    """Standard deviation 3, 480 samples: -0.3 nats, half of which shows; the interval alone would not tell."""
    found = draws(3.0, 480, 300)
    bias = sum(one.estimate for one in found) / 300 - 5.5
    seen = sum(one.bias for one in found) / 300
    assert -0.45 < bias < -0.2
    assert bias < seen < -0.05
    assert sum(one.effective < FEW for one in found) / 300 > 0.9
    assert sum(one.effective < FEW for one in draws(1.0, 480, 300)) == 0


@pytest.mark.parametrize("shift", [-800.0, 0.0, 800.0])
def test_a_shift_of_the_reward_shifts_log_z_alone(shift: float) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, other = of(values), of(values + shift)
    assert other.estimate - shift == pytest.approx(one.estimate, abs=1e-9)
    assert other.bias == pytest.approx(one.bias, abs=1e-9)
    assert other.high - other.low == pytest.approx(one.high - one.low, abs=1e-9)


def test_prompts_are_averaged_not_pooled() -> None:
    a, b = (torch.randn(40, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (3, 4))
    both = of(torch.cat([a, b + 5]), torch.tensor([7] * 40 + [2] * 40))
    one, other = of(a), of(b + 5)
    assert both.estimate == pytest.approx((one.estimate + other.estimate) / 2)
    assert both.bias == pytest.approx((one.bias + other.bias) / 2)
    width = math.hypot(one.high - one.low, other.high - other.low) / 2
    assert both.high - both.low == pytest.approx(width)
    assert both.effective == pytest.approx(min(one.effective, other.effective))


def test_one_weight_above_all_others() -> None:
    found = of(torch.tensor([0.0, 0.0, 1000.0], dtype=torch.float64))
    assert found.effective == pytest.approx(1.0)
    assert math.isfinite(found.bias)
    assert found.bias < 0


def test_equal_rewards_have_no_error_and_single_ones_no_known_one() -> None:
    equal = of(torch.full((9,), 3.0, dtype=torch.float64))
    assert [equal.estimate, equal.bias, equal.low, equal.high, equal.effective] == pytest.approx([3, 0, 3, 3, 9])
    single = of(torch.tensor([3.0], dtype=torch.float64))
    assert single.estimate == pytest.approx(3.0)
    assert math.isnan(single.bias)
    assert math.isnan(single.low)
