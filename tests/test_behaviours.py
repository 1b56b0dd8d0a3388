"""Behaviours: what is drawn, from which seeds, with which weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rtb.behaviours.anneal import annealed
from diffusion_rtb.behaviours.on_policy import OnPolicy
from diffusion_rtb.behaviours.priority import systematic_resample
from diffusion_rtb.config import TrainConfig
from diffusion_rtb.schedules import learning_rate_factor, nth_prompt
from diffusion_rtb.seeds import generators, global_seed, seed_of


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda w: sum(w) > 1e-6),
    count=st.integers(1, 64),
    u=st.floats(0, 0.999),
)
def test_systematic_resampling_is_within_one_of_its_expectation(weights: list[float], count: int, u: float) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    drawn = torch.bincount(systematic_resample(w, count, u), minlength=len(weights))
    expected = count * w / w.sum()
    assert int(drawn.sum()) == count
    assert bool(((drawn - expected).abs() < 1 + 1e-6).all())


def test_systematic_resampling_is_unbiased_over_u() -> None:
    w = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)
    draws = [systematic_resample(w, 3, float(u)) for u in torch.linspace(0, 1, 4001)[:-1]]
    share = torch.bincount(torch.cat(draws), minlength=4) / (3 * 4000)
    torch.testing.assert_close(share.double(), w, rtol=0, atol=1e-3)  # the grid of u resolves 1/4000


def test_exploration_decays_linearly_to_none() -> None:
    source = OnPolicy(0, scale=0.5, until=10)
    first, middle = source.noise_scale(0), source.noise_scale(5)
    assert first is not None
    assert middle is not None
    assert first(0.3) == pytest.approx(1.5)
    assert middle(0.3) == pytest.approx(1.25)
    assert source.noise_scale(10) is None
    assert source.noise_scale(11) is None
    assert OnPolicy(0).noise_scale(0) is None


def test_added_exploration_adds_variances() -> None:
    scale = OnPolicy(0, scale=0.4, until=10, kind="added").noise_scale(0)
    assert scale is not None
    for std in (0.1, 0.4, 2.0):
        assert (scale(std) * std) ** 2 == pytest.approx(std**2 + 0.16)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 0.4), (5, 1.2), (10, 2.0), (50, 2.0)])
def test_beta_anneals_linearly_from_a_fraction(iteration: int, expected: float) -> None:
    assert annealed(2.0, iteration, start=0.2, iterations=10) == pytest.approx(expected)


def test_beta_without_annealing_is_constant() -> None:
    assert annealed(2.0, 0) == 2.0


@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_seeds_depend_on_every_part(run: int, iteration: int, sample: int) -> None:
    base = seed_of(run, "train", iteration, 3, sample)
    assert base == seed_of(run, "train", iteration, 3, sample)
    assert 0 <= base < 2**63
    others = [
        seed_of(run + 1, "train", iteration, 3, sample),
        seed_of(run, "eval", iteration, 3, sample),
        seed_of(run, "train", iteration + 1, 3, sample),
        seed_of(run, "train", iteration, 4, sample),
        seed_of(run, "train", iteration, 3, sample + 1),
    ]
    assert base not in others


def test_joined_parts_do_not_collide() -> None:
    assert seed_of(1, 12, 3) != seed_of(1, 1, 23)


def test_each_trajectory_has_its_own_noise_whatever_the_batch() -> None:
    alone = torch.randn(4, generator=generators([7])[0])
    second = torch.randn(4, generator=generators([1, 7])[1])
    assert torch.equal(alone, second)
    assert not math.isclose(float(alone[0]), float(torch.randn(4, generator=generators([8])[0])[0]))


def test_the_global_generator_is_seeded_inside_and_restored_after() -> None:
    before = torch.get_rng_state()
    with global_seed(3):
        first = torch.randn(2)
    assert torch.equal(torch.get_rng_state(), before)
    with global_seed(3):
        assert torch.equal(torch.randn(2), first)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.5, 0.1]), ("cosine", [1.0, 0.5, 0.0245])],
)
def test_learning_rates_warm_up_and_decay(decay: str, expected: list[float]) -> None:
    train = TrainConfig.model_validate({"iterations": 14, "warmup": 4, "lr_decay": decay})
    assert [learning_rate_factor(train, i) for i in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [learning_rate_factor(train, i) for i in (4, 9, 13)] == pytest.approx(expected, abs=1e-3)


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    rows = [nth_prompt(3, n, 5) for n in range(15)]
    for start in (0, 5, 10):
        assert sorted(rows[start : start + 5]) == list(range(5))
    assert rows[:5] != rows[5:10] or rows[5:10] != rows[10:]
