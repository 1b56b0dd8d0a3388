"""The verdict's words, on evaluations whose truth is known."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from diffusion_rtb.report.numbers import Estimate, decimals, estimate, text
from diffusion_rtb.report.subject import read_subject
from diffusion_rtb.report.verdict import FEW, difference, verdict
from tests.oracles.evaluated import LOG_Z
from tests.oracles.evaluated import evaluated as written

evaluated = partial(written, pictures=False)


def test_the_exact_posterior_is_called_one(tmp_path: Path) -> None:
    better, price, posterior = verdict(read_subject(evaluated(tmp_path / "eval", count=500)))
    assert (better.answer, better.tone) == ("Yes", "good")
    assert price.tone == "good"
    assert float(price.answer.split()[0]) == pytest.approx(LOG_Z, abs=0.1)  # the KL is log Z here, too
    assert posterior.tone == "good"
    assert posterior.answer.startswith("Yes")
    assert f"ELBO is {LOG_Z:.2f}" in posterior.words


def test_an_untrained_model_is_not_called_better(tmp_path: Path) -> None:
    better, price, posterior = verdict(read_subject(evaluated(tmp_path / "eval", shift=0.0, tilt=0.0)))
    assert (better.answer, better.tone) == ("Not shown", "unknown")
    assert "holds 0" in better.words
    assert "0.00" in price.answer
    assert posterior.tone == "bad"
    assert "at least 0." in posterior.words


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    better = verdict(read_subject(evaluated(tmp_path / "eval", shift=-1.0)))[0]
    assert (better.answer, better.tone) == ("No, worse", "bad")
    assert "lower" in better.words


def test_a_judge_that_falls_is_said(tmp_path: Path) -> None:
    better = verdict(read_subject(evaluated(tmp_path / "eval", judged=-2.0)))[0]
    assert (better.answer, better.tone) == ("By the reward; a judge disagrees", "partly")
    assert "<i>held</i> lower" in better.words


def test_few_effective_samples_tell_nothing(tmp_path: Path) -> None:
    posterior = verdict(read_subject(evaluated(tmp_path / "eval", count=FEW // 2)))[2]
    assert (posterior.answer, posterior.tone) == ("Too few prior samples to tell", "unknown")


def test_pictures_of_others_have_no_kl(tmp_path: Path) -> None:
    alone = read_subject(evaluated(tmp_path / "alone", kind="images", prior=False))
    better, price, posterior = verdict(alone)
    assert [line.tone for line in (better, price, posterior)] == ["unknown"] * 3
    assert "no prior samples" in better.words
    assert "without log-densities" in price.words
    beside = verdict(read_subject(evaluated(tmp_path / "beside", kind="images")))
    assert beside[0].answer == "Yes"
    assert beside[1].tone == "unknown"


def test_too_much_is_paid_for_too_little(tmp_path: Path) -> None:
    price = verdict(read_subject(evaluated(tmp_path / "eval", tilt=4.0)))[1]
    assert price.tone == "bad"
    assert "more than the exact posterior's" in price.words


def test_unpaired_intervals_join_like_independent_errors() -> None:
    numbers = {
        "reward": {"prior": {"mean": 1, "low": 0.7, "high": 1.4}, "posterior": {"mean": 2, "low": 1.7, "high": 2.4}}
    }
    assert difference(numbers) == (Estimate(1.0, 1 - 0.5, 1 + 0.5), False)


def test_numbers_are_written_so_that_columns_align() -> None:
    assert [decimals([value]) for value in (1234.5, 123.4, 12.34, 1.234, 0.1234, 0.01234)] == [0, 0, 1, 2, 3, 4]
    assert decimals([2.0, 128.0, None]) == 0
    assert decimals([0.001, 12.5, None]) == decimals([12.5]) == 1
    assert text(-0.0001, 2) == "0.00"
    assert text(-1.5, 1) == "\u22121.5"
    assert text(None) == text(float("nan")) == "–"
    assert estimate({"kl": {"mean": 1.0, "standard_error": 0.1}}, "kl") == Estimate(1.0, 1 - 0.196, 1 + 0.196)


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.2, 1), (-0.1, 0.2, 0), (-0.2, -0.1, -1), (None, None, 0)])
def test_a_sign_needs_the_whole_interval(low: float | None, high: float | None, sign: int) -> None:
    assert Estimate(1.0, low, high).sign == sign
