"""Replay: what is stored, what is drawn and with which weights, and that it is part of the state of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rtb.behaviours._memory import pack, rank_weights, unpack
from diffusion_rtb.behaviours.replay import Replay
from diffusion_rtb.chain.rollout import score
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import occurrences
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.gradient import terms_of
from tests.oracles.behaving import BETA, begin_at_the_posterior, differing, known, rows, run, state

EVERYTHING: list[dict[str, Any]] = [
    {"component": "on_policy", "exploration": 0.3, "until": 4},
    {"component": "prior_buffer", "share": 0.25, "capacity": 6, "refresh": 2},
    {"component": "replay", "share": 0.25, "capacity": 10, "priority": "importance"},
    {"component": "back_and_forth", "share": 0.25, "pool": 12},
]
BUDGET = {"value": BETA, "kl_budget": {"nats": 1.0, "rate": 0.2}}
TWO_PROMPTS: dict[str, Any] = {
    "prompts": {"list": ["a", "b"]},
    "train": {"prompts_per_iteration": 2, "micro_batch": 16},
}


def drawn_by(trainer: Trainer, count: int, first_seed: int = 0) -> Batch:
    """Trajectories of the posterior as it is now, with both densities, as `settle` gets them."""
    seeds = range(first_seed, first_seed + count)
    return trainer.sampler.completed(trainer.sampler.draw([0] * count, seeds))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_rank_weights_follow_order_and_nothing_else(rewards: list[float]) -> None:
    reward = torch.tensor(rewards, dtype=torch.float64)
    weights = rank_weights(reward)
    n = len(rewards)
    expected = sorted((1 / (0.01 * n + rank) for rank in range(n)), reverse=True)
    order = torch.argsort(reward, descending=True, stable=True)
    torch.testing.assert_close(weights[order], torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(rank_weights(reward * 4), weights)  # exact in binary: ties stay ties


def test_the_best_tenth_gets_half_of_the_draws() -> None:
    weights = rank_weights(torch.linspace(0, 1, 500))
    assert float(weights[-50:].sum() / weights.sum()) == pytest.approx(0.52, abs=0.01)


def test_the_last_trajectories_of_each_prompt_are_kept(tmp_path: Path) -> None:
    trainer = run(tmp_path, behaviours=[{"component": "replay", "share": 0.25, "capacity": 15}], **TWO_PROMPTS)
    replay = trainer.sources["replay"][0]
    assert isinstance(replay, Replay)
    seen: list[Batch] = []
    original = replay.settle
    replay.settle = lambda parts: (seen.append(parts["posterior"]), original(parts))[1]  # type: ignore[func-returns-value,method-assign]
    trainer.fit()
    assert len(seen) == 4
    whole = Batch.cat(seen)
    for row in (0, 1):
        x = whole.trajectory.x[whole.prompt == row]
        assert len(x) == 4 * 6
        assert torch.equal(replay.memory[row].trajectory.x, x[-15:])
        assert torch.equal(replay.memory[row].reward, whole.reward[whole.prompt == row][-15:])


@pytest.mark.parametrize("explore", [0.0, 0.4])
def test_the_density_that_a_trajectory_was_drawn_with_is_kept(explore: float, tmp_path: Path) -> None:
    """After the posterior has moved log_q is another one; the stored densities are those of the drawing and of the prior."""
    trainer = run(
        tmp_path,
        behaviours=[
            {"component": "on_policy", "exploration": explore, "until": 1000},
            {"component": "replay", "share": 0.5},
        ],
        train={"lr": 0.3},
    )
    replay = trainer.sources["replay"][0]
    first = trainer.sources["posterior"][0].draw(trainer.sampler, [0], 4, 0, BETA)
    trainer.step()
    trainer.iteration += 1
    trainer.step()
    part = trainer.sampler.completed(replay.draw(trainer.sampler, [0], 8, 2, BETA))
    terms = terms_of(trainer.sampler, part)
    assert terms.log_behaviour is not None
    found = [i for i in range(8) if any(torch.equal(part.trajectory.x[i], x) for x in first.trajectory.x)]
    assert len(found) == 4, "uniform weights draw each of the 8 stored ones once"
    was = first.trajectory.log_prob if explore == 0 else first.trajectory.log_behaviour
    assert was is not None
    for i in found:
        k = next(k for k in range(4) if torch.equal(first.trajectory.x[k], part.trajectory.x[i]))
        assert torch.equal(terms.log_behaviour[i], was[k])
        assert float((terms.log_q[i].detach() - first.trajectory.log_prob[k]).abs().max()) > 0.01
    with trainer.prior.as_prior():
        log_p = score(trainer.prior, [""] * 8, part.trajectory)
    assert torch.equal(terms.log_p, log_p)


@pytest.mark.parametrize("drawn_at", [0.0, 0.6, 1.6])
def test_importance_draws_the_posterior_whoever_filled_the_buffer(drawn_at: float, tmp_path: Path) -> None:
    """Filled by the exact posterior of another beta; what is drawn has the mean and the reward of this one's."""
    trainer = run(tmp_path, prior={"dtype": "float64"}, train={"micro_batch": 8})
    trainer.sampler.micro_batch = 4000
    if drawn_at > 0:
        trainer.prior.set_posterior(known(trainer, drawn_at).best)  # type: ignore[attr-defined]
    replay = Replay(0.5, capacity=4000, priority="importance")
    replay.prepare(seed=0, group=8)
    replay.settle({"posterior": drawn_by(trainer, 4000)})
    drawn = replay.draw(trainer.sampler, [0], 4000, 1, BETA)
    weights = replay.weights(replay.memory[0], BETA)
    ess = float(1 / weights.square().sum())
    assert ess > 150, "too few to compare"
    mean, cov = known(trainer).end
    apart = (drawn.trajectory.x_0.mean(0) - mean) / cov.diagonal().sqrt()
    assert float(apart.abs().max()) < 4.5 / ess**0.5


def test_a_resumed_run_continues_an_uninterrupted_one(tmp_path: Path) -> None:
    """All behaviours that remember, at once; memories, beta, parameters and metrics are equal to the last bit."""
    whole = run(tmp_path / "whole", behaviours=EVERYTHING, beta=BUDGET, train={"iterations": 6})
    whole.fit()
    for iterations in (1, 3, 6):
        parts = run(tmp_path / "parts", behaviours=EVERYTHING, beta=BUDGET, train={"iterations": iterations})
        parts.fit()
    assert rows(parts) == rows(whole)
    found = state(parts)
    assert differing(found, state(whole)) == []
    assert {"source-replay.record.x", "source-back_and_forth.record.x_0", "source-prior.record.log_p"} <= found.keys()


def test_a_failed_iteration_leaves_no_trace(tmp_path: Path) -> None:
    """The reward fails where the last behaviour draws: the others have drawn, and nothing of it is remembered."""
    whole = run(tmp_path / "whole", behaviours=EVERYTHING, beta=BUDGET, train={"iterations": 5})
    whole.fit()
    broken = run(tmp_path / "parts", behaviours=EVERYTHING, beta=BUDGET, train={"iterations": 5})
    last = broken.sources["back_and_forth"][0]
    draw = last.draw

    def failing(*args: Any) -> Batch:
        if broken.iteration == 3:
            raise ConnectionError("the reward's server is gone")
        return draw(*args)

    last.draw = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(ConnectionError):
        broken.fit()
    again = run(tmp_path / "parts", behaviours=EVERYTHING, beta=BUDGET, train={"iterations": 5})
    again.fit()
    assert rows(again) == rows(whole)
    assert differing(state(again), state(whole)) == []


@pytest.mark.parametrize("explored", [False, True])
def test_a_memory_survives_tensors(explored: bool, tmp_path: Path) -> None:
    exploring = {"component": "on_policy", "exploration": 0.5 if explored else 0.0, "until": 2}
    trainer = run(tmp_path, behaviours=[exploring, {"component": "replay", "share": 0.5}], **TWO_PROMPTS)
    trainer.fit()
    replay = trainer.sources["replay"][0]
    assert isinstance(replay, Replay)
    tensors = pack(replay.memory, replay.added)
    back, added = unpack(tensors)
    assert added == replay.added == {0: 4 * 4, 1: 4 * 4}
    assert differing(pack(back, added), tensors) == []
    assert list(back) == [0, 1]
    for row, held in back.items():
        was = replay.memory[row].trajectory
        assert (was.log_behaviour is not None) == explored
        assert torch.equal(held.trajectory.x, was.x)
        assert held.trajectory.log_behaviour is not None
        assert torch.equal(
            held.trajectory.log_behaviour, was.log_prob if was.log_behaviour is None else was.log_behaviour
        )
    assert unpack({}) == ({}, {})


def test_nothing_extra_is_saved_without_these_behaviours(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    trainer.iteration = 1
    trainer.save()
    files = {path.name for path in (trainer.folder / "checkpoints" / "00000001").iterdir()}
    assert not {name for name in files if "replay" in name or "forth" in name}


def test_a_prompt_that_comes_twice_is_drawn_differently(tmp_path: Path) -> None:
    assert occurrences([3, 1, 3, 3, 1]) == [0, 0, 1, 2, 1]
    trainer = run(
        tmp_path,
        behaviours=[
            {"component": "prior_buffer", "share": 0.25, "resample": False},
            {"component": "replay", "share": 0.5},
        ],
    )
    begin_at_the_posterior(trainer)
    trainer.sources["replay"][0].settle({"posterior": drawn_by(trainer, 64)})
    for name in ("posterior", "prior", "replay"):
        twice = trainer.sources[name][0].draw(trainer.sampler, [0, 0], 13, 6, BETA)
        once = trainer.sources[name][0].draw(trainer.sampler, [0], 13, 6, BETA)
        assert torch.equal(twice.trajectory.x[:13], once.trajectory.x)
        assert not torch.equal(twice.trajectory.x[13:], once.trajectory.x), name
