"""Rewards made of rewards: their formulas, what they remember, and that nothing inside them is hidden."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from diffusion_rtb.run.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from diffusion_rtb.scoring.memory import load_reward, observing, reward_tensors, stateful_rewards
from rewards.cached import Cached
from rewards.clamp import Clamp
from rewards.constraint import Constraint
from rewards.ensemble import Ensemble
from rewards.standardise import Standardise
from rewards.weighted_sum import WeightedSum

CALLS: list[int] = []
"""Images in each call of `first`."""


def first(images: Tensor, prompts: Sequence[str], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The first number of each image."""
    CALLS.append(len(images))
    return images.flatten(1)[:, 0] * scale + shift


def second(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1)[:, 1]


def third(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1)[:, 2]


def length(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def not_finite(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1)[:, 0] * float("nan")


def column(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1)[:, :1]


FIRST, SECOND, THIRD, LENGTH = ({"component": f"{__name__}:{f.__name__}"} for f in (first, second, third, length))
LOG_P = {**FIRST, "scale": 1.0}


def images_of(values: Sequence[float]) -> Tensor:
    """Images whose first number is given."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def call(reward: Any, values: Sequence[float], prompt: str = "a cat") -> Tensor:
    return evaluate_reward(reward, images_of(values), [prompt] * len(values), "outer")


numbers = st.floats(-50, 50, width=32)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=6), numbers, numbers)
def test_clamp(values: list[float], low: float, high: float) -> None:
    if low < high:
        np.testing.assert_array_equal(call(Clamp(FIRST, low=low, high=high), values), np.clip(values, low, high))
    np.testing.assert_array_equal(call(Clamp(FIRST, low=low), values), np.maximum(values, low))
    np.testing.assert_array_equal(call(Clamp(FIRST, high=high), values), np.minimum(values, high))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_ensemble_is_mean_minus_k_standard_deviations(seed: int, k: float) -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    members = images.flatten(1)[:, :3].double().numpy()
    values = evaluate_reward(Ensemble([FIRST, SECOND, THIRD], k=k), images, ["a"] * 4, "ensemble")
    np.testing.assert_allclose(values, members.mean(1) - k * np.std(members, axis=1), atol=1e-5)
    if k >= math.sqrt(2):  # Samuelson's inequality: no member is further than sqrt(n - 1) deviations from the mean
        assert (values.double().numpy() <= members.min(1) + 1e-5).all()


def test_members_that_disagree_are_trusted_less() -> None:
    reward = Ensemble([{**FIRST, "name": "a"}, {**FIRST, "name": "b", "shift": 2.0}], k=1.0)
    assert call(reward, [1.0, 5.0]).tolist() == [1.0, 5.0]  # mean 1 above the first, deviation 1


def test_gradients_pass_where_they_are_asked_for() -> None:
    # The judges agree exactly on the first image, where the root of the variance is not differentiable.
    images = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    images[0] = 0.5
    inner = Ensemble([FIRST, SECOND, THIRD], k=0.5)
    outer = WeightedSum([{**FIRST, "weight": 2.0}, {"component": "brightness", "weight": -3.0}])
    for reward in (inner, outer):
        wanted = images.clone().requires_grad_()
        reward(wanted, ["a", "b"]).sum().backward()
        assert wanted.grad is not None
        assert wanted.grad.isfinite().all()
        if reward is outer:
            expected = torch.full((2, 12), -3.0 / 12, dtype=torch.float64)
            expected[:, 0] += 2.0
            torch.testing.assert_close(wanted.grad.flatten(1), expected)
    smooth = images[1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inner(x, ["a"]), smooth)
    assert not outer(images, ["a", "b"]).requires_grad


batches = st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=2, max_size=5)


@settings(deadline=None)
@given(batches)
def test_statistics_are_those_of_everything_seen(seen: list[list[float]]) -> None:
    reward = Standardise(FIRST, samples=None)
    for batch in seen:
        with observing(reward):
            call(reward, batch)
    everything = np.concatenate(seen).astype(np.float64)
    mean, std = reward.statistics()
    assert mean == pytest.approx(everything.mean(), abs=1e-9)
    assert std == pytest.approx(everything.std() if everything.std() > max(1e-7 * abs(mean), 1e-30) else 1.0, rel=1e-6)
    np.testing.assert_allclose(call(reward, [3.0, -1.0]), (np.array([3.0, -1.0]) - mean) / std, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(batches)
def test_processes_learn_the_same_together(shares: list[list[float]]) -> None:
    """Each process has its share of an iteration; all end with the statistics of one process that has it all."""
    ranks = [Standardise(FIRST, samples=None) for _ in shares]
    rows: list[Tensor] = []
    for reward, share in zip(ranks, shares, strict=True):
        reward.observe()
        call(reward, share)
        reward.settle(lambda row: rows.append(row) or row)  # type: ignore[func-returns-value]
        reward.load({})
        reward.observe()
        call(reward, share)
    for reward in ranks:
        reward.settle(lambda row: torch.cat(rows))
    everything = np.concatenate(shares).astype(np.float64)
    for reward in ranks:
        assert reward.statistics() == ranks[0].statistics()
        assert reward.statistics()[0] == pytest.approx(everything.mean(), abs=1e-9)
        assert reward.tensors()["moments"][2] == pytest.approx(everything.var() * len(everything), rel=1e-6, abs=1e-6)


def test_scale_and_origin_of_the_inner_reward_do_not_matter() -> None:
    seen = [[1.0, 4.0, 2.0], [7.0, -3.0]]
    outcomes = []
    for scale, shift in ((1.0, 0.0), (1000.0, -5.0)):
        reward = Standardise({**FIRST, "scale": scale, "shift": shift})
        values = []
        for batch in seen:
            with observing(reward):
                values.append(call(reward, batch))
        outcomes.append(torch.cat([*values, call(reward, [0.5])]))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-4)
    assert outcomes[0][:3].mean().abs() < 1e-6, "the first iteration is in its own units"


def test_values_follow_the_earlier_iterations_only() -> None:
    reward = Standardise(FIRST)
    with observing(reward):
        call(reward, [0.0, 2.0])
    with observing(reward):
        before = call(reward, [10.0])
        assert torch.equal(call(reward, [10.0]), before), "no call moves another of its iteration"
    assert before.item() == 9.0  # mean 1, std 1 of the first iteration
    assert call(reward, [10.0]).item() < 9.0


def test_outside_of_training_nothing_is_learned() -> None:
    reward = Standardise(FIRST)
    with pytest.raises(RewardError, match=r"has seen no values of .*first.*give `mean` and `std`"):
        call(reward, [1.0, 2.0])
    with observing(reward):
        call(reward, [0.0, 2.0])
    saved = reward.tensors()
    call(reward, [100.0])
    assert torch.equal(reward.tensors()["moments"], saved["moments"])


def test_a_failed_iteration_is_forgotten() -> None:
    reward = Standardise(FIRST)
    with observing(reward):
        call(reward, [0.0, 2.0])
    saved = reward.tensors()["moments"]

    def iteration() -> None:
        with observing(reward):
            call(reward, [100.0])
            raise KeyError("out of memory")

    with pytest.raises(KeyError):
        iteration()
    with observing(reward):
        pass
    assert torch.equal(reward.tensors()["moments"], saved)


def test_after_enough_images_the_target_stays() -> None:
    reward = Standardise(FIRST, samples=4)
    for batch in ([0.0, 2.0], [4.0, 6.0], [100.0], [200.0]):
        with observing(reward):
            call(reward, batch)
    assert reward.statistics() == (3.0, math.sqrt(5.0))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_equal_values_are_centred_only(value: float) -> None:
    reward = Standardise(FIRST)
    with observing(reward):
        call(reward, [value] * 7)
    assert reward.statistics()[1] == 1.0
    assert call(reward, [value + 3.0]).item() == pytest.approx(3.0, rel=1e-5)


def test_known_statistics() -> None:
    reward = Standardise(FIRST, mean=2.0, std=4.0)
    with observing(reward):
        assert call(reward, [10.0]).item() == 2.0
    assert reward.tensors() == {}


def nested() -> WeightedSum:
    inner = {"component": "standardise", "reward": {**FIRST, "scale": 3.0}}
    other = {"component": "clamp", "low": -1.0, "reward": {"component": "standardise", "reward": SECOND, "name": "s/t"}}
    members = {"component": "ensemble", "rewards": [{**inner, "name": "a"}, {"component": "jpeg"}]}
    return WeightedSum([{**inner, "name": "fit"}, {**other, "name": "other"}, {**members, "weight": 0.1}])


def test_what_is_inside_is_saved_and_comes_back(tmp_path: Path) -> None:
    """A run that is interrupted and resumed has the values of one that was not."""
    reward = nested()
    assert list(stateful_rewards(reward)) == ["fit/", "other/s/t/", "ensemble/a/"]
    images = torch.rand(6, 3, 8, 8)
    prompts = ["a"] * 6
    with observing(reward):
        reward(images[:4], prompts[:4])
    path = save_checkpoint(tmp_path, 1, {"reward": reward_tensors(reward)}, {}, keep=1)
    resumed = nested()
    load_reward(resumed, load_checkpoint(path)[0]["reward"])
    for run in (reward, resumed):
        with observing(run):
            run(images[4:], prompts[4:])
    assert torch.equal(reward(images, prompts), resumed(images, prompts))


def test_a_memory_of_another_reward_is_refused() -> None:
    reward = nested()
    with observing(reward):
        reward(torch.rand(4, 3, 8, 8), ["a"] * 4)
    saved = reward_tensors(reward)
    with pytest.raises(
        ValueError, match=r"memory 'fit/moments' that belongs to no reward of this run \(those with one: none\)"
    ):
        load_reward(build(FIRST, "reward"), saved)
    with pytest.raises(ValueError, match=r"memory 'other/s/t/moments' .*with one: 'fit/', 'ensemble/a/'"):
        load_reward(
            WeightedSum(
                [
                    {"component": "standardise", "reward": FIRST, "name": "fit"},
                    {
                        "component": "ensemble",
                        "rewards": [{"component": "standardise", "reward": FIRST, "name": "a"}, FIRST],
                    },
                ]
            ),
            saved,
        )
    with pytest.raises(ValueError, match=r"remembers 'moments', not \['momentum'\]"):
        load_reward(Standardise(FIRST), {"momentum": torch.zeros(3)})


def test_rewards_without_a_memory_have_none() -> None:
    module = torch.nn.Linear(2, 2)  # a network is not a memory: checkpoints would hold it
    assert reward_tensors(module) == {}
    assert reward_tensors(build(FIRST, "reward")) == {}
    load_reward(module, {})


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def test_each_image_is_judged_once() -> None:
    reward = Cached(FIRST)
    assert call(reward, [1.0, 2.0, 1.0, 3.0, 2.0]).tolist() == [1.0, 2.0, 1.0, 3.0, 2.0]
    assert CALLS == [3]
    assert call(reward, [3.0, 4.0]).tolist() == [3.0, 4.0]
    assert call(reward, [4.0, 1.0]).tolist() == [4.0, 1.0]
    assert CALLS == [3, 1]
    assert call(reward, []).tolist() == []


def test_prompt_shape_and_type_belong_to_the_image() -> None:
    reward = Cached(LENGTH)
    images = images_of([1.0] * 3)
    assert reward(images, ["a", "bb", "a"]).tolist() == [1, 2, 1]
    assert len(reward._memory) == 2
    reward(images.reshape(3, 3, 4, 1), ["a"] * 3)
    reward(images.double(), ["a"] * 3)
    assert len(reward._memory) == 4


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=6), st.integers(1, 4))
def test_a_small_memory_forgets_but_never_errs(asked: list[list[int]], size: int) -> None:
    reward = Cached({**FIRST, "scale": 2.0}, size=size)
    for values in asked:
        assert call(reward, list(map(float, values))).tolist() == [2.0 * value for value in values]
        assert len(reward._memory) <= size


def test_the_file_outlives_the_process_and_tells_arguments_apart(tmp_path: Path) -> None:
    file = str(tmp_path / "rewards.sqlite")
    expected = call(Cached(FIRST, file=file), [0.1, 0.2])
    assert torch.equal(call(Cached(FIRST, file=file), [0.1, 0.2, 0.3])[:2], expected)
    assert CALLS == [2, 1]
    assert call(Cached({**FIRST, "scale": 10.0}, file=file), [0.5]).item() == 5.0
    assert call(Cached(FIRST, file=file), [0.5]).item() == 0.5


def test_several_share_the_file(tmp_path: Path) -> None:
    file = str(tmp_path / "rewards.sqlite")
    wrong: list[Any] = []

    def work(start: int) -> None:
        reward = Cached(FIRST, file=file)
        for k in range(20):
            values = [float(start + k + i) for i in range(3)]
            try:
                if call(reward, values).tolist() != values:
                    wrong.append(values)
            except Exception as error:  # noqa: BLE001 — an exception in a thread would be lost
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("This is a letter, not a database. " * 100)
    with pytest.raises(ValueError, match=r"note\.txt cannot be used as a cache .*delete it, or name another file"):
        Cached(FIRST, file=str(tmp_path / "note.txt")).load_weights()


def test_what_learns_is_not_cached() -> None:
    with pytest.raises(ValueError, match="'standardise' change as it learns"):
        Cached({"component": "standardise", "reward": FIRST}).load_weights()
    Standardise({"component": "cached", "reward": FIRST})


def test_the_step_is_a_step_and_the_hinge_rises() -> None:
    p = [0.0, 0.2, 0.5, 0.501, 0.75, 1.0]
    log_p = [math.log(value) if value else -80.0 for value in p]
    step = call(Constraint(LOG_P, limit=0.5, penalty=3.0), log_p)
    assert step.tolist() == [0, 0, 0, -3, -3, -3]
    hinge = call(Constraint(LOG_P, limit=0.5, penalty=3.0, kind="hinge"), log_p)
    np.testing.assert_allclose(hinge, [0, 0, 0, -0.006, -1.5, -3], atol=1e-5)


def test_a_broken_constraint_costs_its_weight() -> None:
    """exp(beta·r) of an image that breaks the constraint is exp(-beta·penalty) of what it was."""
    rule = {"component": "constraint", "classifier": {**LOG_P, "name": "nsfw"}, "limit": 0.9, "penalty": 2.0}
    reward = WeightedSum([SECOND, rule])
    safe, unsafe = torch.rand(2, 3, 2, 2)
    safe[0, 0, 0], unsafe[0, 0, 0] = -5.0, 0.0
    weight = (1.5 * reward(torch.stack([safe, unsafe]), ["a", "b"])).exp()
    plain = (1.5 * second(torch.stack([safe, unsafe]), [])).exp()
    torch.testing.assert_close(weight / plain, torch.tensor([1.0, math.exp(-3.0)]))


def test_rounding_above_zero_is_forgiven_more_is_not() -> None:
    reward = Constraint(LOG_P, kind="hinge", penalty=1.0)
    assert call(reward, [5e-5]).item() == -1.0
    with pytest.raises(RewardError, match=r"first' gave 0\.7 where a log-probability, at most 0, is needed"):
        call(reward, [-3.0, 0.7])


def test_a_real_classifier_constrains() -> None:
    classifier = {"component": "classifier", "target": 1, "classes": ["a cat emoji", "a dog emoji"]}
    images = torch.rand(3, 3, 64, 64)
    p = build(classifier, "reward").log_probs(images).exp()[:, 1]
    limit = float(p.sort().values[1])
    values = build({"component": "constraint", "classifier": classifier, "limit": limit, "penalty": 1.0}, "reward")(
        images, ["a"] * 3
    )
    assert values.tolist() == [-float(value > limit) for value in p]


def of(name: str, **arguments: Any) -> dict[str, Any]:
    inner = {"rewards": [FIRST, SECOND]} if name == "ensemble" else {"reward": FIRST}
    return {"component": name, **(inner if name != "constraint" else {"classifier": FIRST}), **arguments}


@pytest.mark.parametrize(
    "component, message",
    [
        (of("clamp"), "neither `low` nor `high`"),
        (of("clamp", low=1.0, high=1.0), "low is 1.0 and high is 1.0: low must be below high"),
        (of("clamp", high=float("inf")), "high is inf: it must be finite"),
        (of("clamp", low=0.0, reward={"component": "jpg"}), "no reward named 'jpg'.*mean 'jpeg'"),
        (of("ensemble", rewards=[FIRST]), "alone has nothing to disagree"),
        (of("ensemble", rewards=[FIRST, FIRST]), "Two rewards are called .*add `name"),
        (of("ensemble", rewards=[]), "rewards is empty"),
        (of("ensemble", k=-0.5), "k is -0.5: it must be finite and at least 0"),
        (of("standardise", mean=1.0), "mean is 1.0 and std is None: give both"),
        (of("standardise", mean=0.0, std=0.0), "std is 0.0: it must be finite and positive"),
        (of("standardise", mean=float("nan"), std=1.0), "mean is nan"),
        (of("standardise", samples=1), "samples is 1: a standard deviation needs"),
        (of("standardise", reward={**FIRST, "scal": 2.0}), "no argument 'scal'.*mean 'scale'"),
        (of("cached", size=0), "size is 0"),
        (of("constraint", limit=1.0), r"limit is 1.0: it is a probability in \[0, 1\)"),
        (of("constraint", penalty=-1.0), "penalty is -1.0: it must be positive"),
        (of("constraint", kind="soft"), "kind.*soft"),
    ],
    ids=str,
)
def test_bad_arguments(component: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(component, "reward")
    with pytest.raises(ValueError, match=message):
        build(component, "reward")


def test_a_cache_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere for the cache"):
        describe(of("cached", file=str(tmp_path / "nowhere" / "c.sqlite")), "reward")


@pytest.mark.parametrize("name", ["clamp", "standardise", "cached", "ensemble", "constraint"])
@pytest.mark.parametrize("bad, message", [(not_finite, "is nan for image 0"), (column, r"returned shape \(2, 1\)")])
def test_what_breaks_inside_is_named(name: str, bad: Any, message: str) -> None:
    inner = {"component": f"{__name__}:{bad.__name__}", "name": "mine"}
    more: dict[str, Any] = {"clamp": {"low": 0.0}, "standardise": {"mean": 0.0, "std": 1.0}}.get(name, {})
    key = {"ensemble": "rewards", "constraint": "classifier"}.get(name, "reward")
    reward = build({"component": name, key: [inner, FIRST] if name == "ensemble" else inner, **more}, "reward")
    with pytest.raises(RewardError, match=f"Reward 'mine' on images 0 to 1 .*{message}"):
        reward(images_of([1.0, 2.0]), ["a", "b"])
    if bad is column:
        with pytest.raises(RewardError, match="'mine' returned shape" if name != "cached" else "'mine'"):
            reward(images_of([1.0, 2.0]).requires_grad_(), ["a", "b"])
