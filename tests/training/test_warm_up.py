"""What a run does before its first iteration: trajectories are drawn for a warm-up, a few at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.rollout import score_with_means
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.comparison.cost import Meter
from diffusion_rtb.interfaces import Walks
from diffusion_rtb.objectives.value_gradient import ValueGradient
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import QUADRATIC, run

PROMPTS = ["a", "b", "c"]
LEARNER = {"component": "trust_pcl", "length": 1, "value_loss": "none", "warm_up_updates": 5, "width": 4}


def made(out: Path, share: float = 0.0, **sections: Any) -> Trainer:
    objective = LEARNER | sections.pop("objective", {})
    sizes = {"iterations": 1, "group": 4, "micro_batch": 4, "prompts_per_iteration": 2}
    lists = {"list": PROMPTS}
    return run(
        out,
        reward=QUADRATIC,
        objective=objective,
        behaviours=[{"component": "prior_buffer", "share": share, "capacity": 10}],
        prompts=lists,
        train=sizes,
        **sections,
    )


def seen_by(trainer: Trainer) -> list[int]:
    """Images per call of the reward."""
    reward, counts = trainer.sampler.reward, []

    def counted(images: Tensor, prompts: Any) -> Tensor:
        counts.append(len(images))
        values: Tensor = reward(images, prompts)
        return values

    trainer.sampler.reward = counted
    return counts


def value_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}


@pytest.mark.parametrize("states", ["noised", "recorded"])
def test_a_warm_up_without_prior_share_learns_what_one_with_it_learns(states: str, tmp_path: Path) -> None:
    objective = {"warm_up_states": states}
    without = made(tmp_path / "without", objective=objective)
    before = value_of(without)
    counts = seen_by(without)
    without._begin()
    kept = made(tmp_path / "kept", objective=objective, share=0.25)
    kept._begin()
    after, expected = value_of(without), value_of(kept)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in expected:  # drawn in other micro-batches: prompt by prompt
        torch.testing.assert_close(after[name], expected[name], rtol=1e-4, atol=1e-5)
    assert sum(counts) == 3 * 10
    assert max(counts) <= 4
    assert not without.sources["prior"][0].tensors(), "nothing is kept that is not drawn from"
    assert len(kept.sources["prior"][0].tensors()["record.reward"]) == 3 * 10


def test_only_clean_samples_are_held_where_states_are_noised(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []
    for states in ("noised", "recorded"):
        trainer = made(tmp_path / states, objective={"warm_up_states": states})

        def seen(terms: Any, beta: float, noise: Any) -> None:
            shapes.append(tuple(terms.x.shape))

        trainer.objective.warm_up = seen  # type: ignore[attr-defined]
        trainer._begin()
    assert shapes == [(30, 1, 2), (30, 5, 2)]


def test_nothing_is_drawn_for_an_objective_that_does_not_warm_up(tmp_path: Path) -> None:
    trainer = made(tmp_path, objective={"value_loss": "consistency", "warm_up_updates": 0})
    counts = seen_by(trainer)
    trainer._begin()
    assert counts == []
    assert not trainer.warmed


def test_a_buffer_is_filled_and_rewarded_in_micro_batches(tmp_path: Path) -> None:
    trainer = made(tmp_path, objective={"value_loss": "consistency", "warm_up_updates": 0}, share=0.25)
    counts = seen_by(trainer)
    trainer.step()
    assert max(counts) == 4
    assert [len(held) for held in trainer.sources["prior"][0].memory.values()] == [10, 10]  # type: ignore[attr-defined]


def test_a_prompts_buffer_does_not_depend_on_the_others(tmp_path: Path) -> None:
    one, other = (made(tmp_path / name, share=0.25) for name in ("one", "other"))
    buffers = [trainer.sources["prior"][0] for trainer in (one, other)]
    buffers[0].draw(one.sampler, [0, 1, 2], 1, 0, 1.0)
    buffers[1].draw(other.sampler, [2], 1, 0, 1.0)
    first, second = (buffer.extended[0][2] for buffer in buffers)  # type: ignore[attr-defined]
    assert torch.equal(first.trajectory.x, second.trajectory.x)
    assert torch.equal(first.reward, second.reward)


def test_the_prior_is_asked_once_about_each_state_that_v_led_it_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = {"component": "value_gradient", "warm_up_updates": 5, "rounds": 1, "walks": 3}
    trainer = run(
        tmp_path,
        reward=QUADRATIC,
        objective=objective,
        behaviours=[{"component": "prior_buffer", "share": 0.25, "capacity": 10, "noised": True}],
        prompts={"list": PROMPTS},
        train={"iterations": 1, "group": 4, "micro_batch": 4, "prompts_per_iteration": 2},
    )
    assert isinstance(trainer.objective, ValueGradient)
    found: list[Walks] = []
    monkeypatch.setattr(trainer.objective, "refine", lambda walks, *rest: found.append(walks))
    meter = Meter(trainer.sampler)
    meter.go(memory=False)
    trainer._begin()
    meter.stop()
    (walks,) = found
    steps = len(walks.std)
    assert meter.spent["network_calls"] == (10 + 3) * len(PROMPTS) * steps
    chain = Trajectory(walks.x, walks.times[:-1], walks.std, torch.zeros(len(walks.x), steps))
    with trainer.prior.as_prior():
        _, _, means = score_with_means(trainer.prior, trainer.sampler.texts([0, 0, 0, 1, 1, 1, 2, 2, 2]), chain)
    torch.testing.assert_close(walks.mean_p[:, chain.stochastic], means[:, chain.stochastic])
    still = ~chain.stochastic
    torch.testing.assert_close(walks.mean_p[:, still], walks.x[:, 1:][:, still])
