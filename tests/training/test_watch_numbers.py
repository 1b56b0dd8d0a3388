"""What an alarm is computed from: paired changes and their errors against other computations, bands, the best look, the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.watch.section import Bands, WatchConfig
from diffusion_rtb.evaluation.similarity import mean_pairwise_cosine_distance
from diffusion_rtb.run.best import Best
from diffusion_rtb.training.watch.change import Change, Verdict, verdict
from diffusion_rtb.training.watch.look import Look
from diffusion_rtb.training.watch.picture import shown
from diffusion_rtb.training.watch.policy import better, candidate

PROMPTS, SAMPLES = 3, 8
PROMPT = torch.arange(PROMPTS).repeat_interleave(SAMPLES)


def a_look(generator: torch.Generator, **changed: Tensor) -> Look:
    n = len(PROMPT)
    return Look(
        prompt=PROMPT,
        reward=changed.get("reward", torch.randn(n, generator=generator)),
        judges={"judge": changed.get("judge", torch.randn(n, generator=generator))},
        x_0=torch.randn(n, 2, generator=generator),
        log_q=torch.zeros(n, 3),
        log_p=torch.zeros(n, 3),
        loudness=changed.get("loudness", torch.ones(n, dtype=torch.float64)),
        embedding=changed.get("embedding", torch.randn(n, 5, generator=generator)),
    )


@pytest.fixture
def prior() -> Look:
    return a_look(torch.Generator().manual_seed(1))


def of_kind(found: Verdict, kind: str) -> Change:
    return next(change for change in found.others if change.kind == kind)


def test_scores_change_in_paired_standard_deviations_of_the_prior(prior: Look) -> None:
    difference = torch.randn(len(PROMPT), generator=torch.Generator().manual_seed(2)) * 0.1 + 1.5
    found = verdict(prior, replace(prior, reward=prior.reward + difference), Bands())
    groups = prior.reward.double().reshape(PROMPTS, SAMPLES)
    spread = groups.var(1).mean().sqrt()
    paired = difference.double().reshape(PROMPTS, SAMPLES)
    assert found.rise.size == pytest.approx(float(paired.mean() / spread), rel=1e-5)
    assert found.rise.error == pytest.approx(float((paired.var(1) / SAMPLES).sum().sqrt() / PROMPTS / spread), rel=1e-4)
    unpaired = math.sqrt(2 * float(groups.var(1).mean()) / len(PROMPT)) / float(spread)
    assert found.rise.error < unpaired / 3, "what both sides have in common is no uncertainty"
    assert all(change.size == pytest.approx(0.0, abs=1e-12) for change in found.others)
    assert not found.wrong


def test_the_lost_diversity_and_its_jackknife(prior: Look) -> None:
    assert prior.embedding is not None
    common = torch.ones(5) * 2
    posterior = replace(prior, embedding=prior.embedding * 0.3 + common)
    found = of_kind(verdict(prior, posterior, Bands()), "diversity")

    def lost(keep: Tensor) -> float:
        sides = []
        for look in (prior, posterior):
            assert look.embedding is not None
            rows = [look.embedding[keep & (look.prompt == row)] for row in range(PROMPTS)]
            sides.append(sum(mean_pairwise_cosine_distance(e) for e in rows) / PROMPTS)
        return 1 - sides[1] / sides[0]

    everything = torch.ones(len(PROMPT), dtype=torch.bool)
    assert found.size == pytest.approx(lost(everything), rel=1e-9)
    left = torch.tensor([lost(everything & (torch.arange(len(PROMPT)) != i)) for i in range(len(PROMPT))])
    groups = left.double().reshape(PROMPTS, SAMPLES)
    variance = (SAMPLES - 1) / SAMPLES * (groups - groups.mean(1, keepdim=True)).square().sum()
    assert found.error == pytest.approx(float(variance.sqrt()), rel=1e-4)
    assert found.size > 0.5


WRONG: dict[str, Callable[[Look], dict[str, Any]]] = {
    "judge": lambda p: {"judges": {"judge": p.judges["judge"] - 1.0}},
    "diversity": lambda p: {"embedding": (p.embedding if p.embedding is not None else p.x_0) * 0.05 + 1.0},
    "norm_ratio": lambda p: {"loudness": p.loudness * 1.3},
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_alarm_needs_the_reward_up_and_something_down(prior: Look, kind: str) -> None:
    wrong = WRONG[kind](prior)
    up = prior.reward + 1.0
    assert [c.kind for c in verdict(prior, replace(prior, reward=up, **wrong), Bands()).wrong] == [kind]
    assert not verdict(prior, replace(prior, **wrong), Bands()).wrong, "without a rise there is nothing to hack"
    assert not verdict(prior, replace(prior, reward=up), Bands()).wrong
    wide = Bands(judge=5.0, diversity=0.999, norm_ratio=5.0)
    assert not verdict(prior, replace(prior, reward=up, **wrong), wide).wrong


def test_noise_does_not_raise_it() -> None:
    """A posterior that is the prior under other noise, with bands that everything exceeds: only the errors are in the way."""
    generator = torch.Generator().manual_seed(5)
    tiny = Bands(reward=1e-9, judge=1e-9, diversity=1e-9, norm_ratio=1e-9)
    seen = [verdict(a_look(generator), a_look(generator), tiny) for _ in range(100)]
    for name, changes in {
        "rise": [v.rise for v in seen],
        "judge": [of_kind(v, "judge") for v in seen],
        "diversity": [of_kind(v, "diversity") for v in seen],
    }.items():
        share = sum(change.beyond for change in changes) / len(seen)
        assert share < 0.08, f"{name}: one-sided at 2 standard errors, 2.3 % where they are Gaussian"
    assert sum(bool(v.wrong) for v in seen) <= 2, "both the reward and another by chance"


def test_what_has_no_spread_is_never_beyond() -> None:
    flat = a_look(torch.Generator().manual_seed(0), judge=torch.ones(len(PROMPT)), embedding=torch.ones(len(PROMPT), 5))
    posterior = replace(flat, reward=flat.reward + 3, judges={"judge": torch.zeros(len(PROMPT))})
    found = verdict(flat, posterior, Bands())
    assert found.rise.beyond
    assert not found.wrong
    best = candidate(3, WatchConfig(), found, kl=0.1)
    assert best is not None
    assert best.numbers.keys() == {"reward", "kl", "rise"}


def seen_as(policy: str, iteration: int, **numbers: float) -> Best:
    return Best(iteration, policy, numbers, {"samples": 8})


def test_each_policy_by_its_definition() -> None:
    low = {"reward": 1.0, "kl": 0.5, "rise": 1.0, "kept": 0.9, "judges": 0.1}
    high = {"reward": 3.0, "kl": 4.0, "rise": 3.0, "kept": 0.2, "judges": -0.4}

    def wins(policy: str, beta: float = 1.0) -> bool:
        return better(seen_as(policy, 2, **high), seen_as(policy, 1, **low), beta)

    assert wins("reward")
    assert not wins("judge")
    assert not wins("frontier")  # 3.0 · 0.2 < 1.0 · 0.9
    assert not wins("elbo", beta=1.0)  # 3 - 4 < 1 - 0.5
    assert wins("elbo", beta=2.0)  # 6 - 4 > 2 - 0.5: at today's beta, whatever it was then
    same = seen_as("elbo", 1, **low)
    assert not better(replace(same, iteration=2), same, 1.0), "of equals the earlier stays"
    assert better(replace(same, iteration=2, settings={"samples": 4}), same, 1.0), "seen otherwise: no measure"
    assert better(same, replace(same, iteration=2), 1.0), "ahead of the run"


def test_the_best_by_frontier_is_exceeded_by_none() -> None:
    axes = list(product((-1.0, 0.0, 1.0, 2.0), (0.0, 0.5, 1.0), (0.0, 1.0)))
    looks = [seen_as("frontier", i, reward=r, kl=kl, rise=r, kept=kept) for i, (r, kept, kl) in enumerate(axes)]
    for start in range(0, len(looks), 5):
        some = looks[start:] + looks[:start]
        some = [replace(look, iteration=i) for i, look in enumerate(some)]
        best: Best | None = None
        for look in some[:12]:
            best = look if better(look, best, 1.0) else best
        assert best is not None
        mine = best.numbers
        for other in (look.numbers for look in some[:12]):
            at_least = other["reward"] >= mine["reward"] and other["kept"] >= mine["kept"] and other["kl"] <= mine["kl"]
            assert not (
                at_least and (other["reward"], other["kept"], other["kl"]) != (mine["reward"], mine["kept"], mine["kl"])
            )


def test_a_look_in_alarm_is_no_candidate(prior: Look) -> None:
    found = verdict(prior, replace(prior, reward=prior.reward + 1.0, **WRONG["judge"](prior)), Bands())
    assert candidate(5, WatchConfig(), found, kl=1.0) is None


def test_the_picture_shows_where_it_went_wrong(prior: Look) -> None:
    assert prior.embedding is not None
    judge, embedding = prior.judges["judge"].clone(), prior.embedding.clone()
    judge[11] -= 9.0
    embedding[PROMPT == 2] = embedding[PROMPT == 2] * 0.01 + 1.0
    pictures = torch.zeros(len(PROMPT), 3, 2, 2)
    before = replace(prior, x_0=pictures)
    after = replace(before, judges={"judge": judge}, embedding=embedding)
    found = verdict(before, after, Bands())
    rows = shown(before, after, of_kind(found, "judge"))
    assert rows[0] == 11
    assert set(PROMPT[rows].tolist()) == {1}
    assert len(rows) == 4
    rows = shown(before, after, of_kind(found, "diversity"))
    assert rows.tolist() == [16, 17, 18, 19]
