"""The checked call of a reward: what breaks the contract stops with the reward, the image and the prompt by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.scoring.call import RewardError, evaluate_reward

PROMPTS = ["a cat", "a dog", "a tree", "a cup", "a car"]


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def returning(change: Callable[[Tensor], Any]) -> Any:
    return lambda images, prompts: change(brightness(images, prompts))


def some_images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 4, 4)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 7), chunk=st.none() | st.integers(1, 9))
def test_chunks_make_no_difference(count: int, chunk: int | None) -> None:
    sizes = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append((len(images), len(prompts)))
        return brightness(images, prompts) + torch.tensor([float(p) for p in prompts])

    images = some_images(count)
    values = evaluate_reward(reward, images, [str(i) for i in range(count)], "sum", chunk=chunk)
    torch.testing.assert_close(values, brightness(images, []) + torch.arange(count))
    assert sum(n for n, _ in sizes) == count
    assert all(n == m <= (chunk or count) for n, m in sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_detached_float32(dtype: torch.dtype) -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0))
    values = evaluate_reward(returning(lambda r: (r * scale).to(dtype)), some_images(), PROMPTS, "scaled")
    assert values.dtype == torch.float32
    assert not values.requires_grad


def with_value(index: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda r: r.index_fill(0, torch.tensor([index]), value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r[:, None], r"returned shape \(5, 1\); return values\.squeeze\(1\).*broadcast to \(batch, batch\)"),
        (lambda r: r.mean(), r"returned shape \(\); return one number per image, shape \(5,\)"),
        (lambda r: r[:-1], r"returned shape \(4,\)"),
        (lambda r: r.tolist(), r"returned a list; return a torch tensor of shape \(5,\)"),
        (lambda r: r.long(), r"returned torch\.int64; return a floating dtype"),
        (lambda r: r.to("meta"), r"returned values on meta; return values\.to\(images\.device\)"),
        (with_value(2, float("nan")), r"is nan for image 2, prompt 'a tree' \(1 of 5"),
        (with_value(4, float("-inf")), r"is -inf for image 4, prompt 'a car'"),
        (lambda r: r.double() + 1e300, r"is inf for image 0, prompt 'a cat' \(5 of 5"),
    ],
)
def test_a_broken_contract_stops_with_its_name(change: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(RewardError, match=r"Reward 'mine' on images 0 to 4 .*" + message):
        evaluate_reward(returning(change), some_images(), PROMPTS, "mine")


def test_the_bad_image_is_counted_over_the_whole_batch() -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float("nan") if p == "a cup" else 0.0 for p in prompts])

    with pytest.raises(RewardError, match="on images 2 to 3 is nan for image 3, prompt 'a cup'"):
        evaluate_reward(reward, some_images(), PROMPTS, "mine", chunk=2)


def test_what_a_reward_raises_is_kept_as_the_cause() -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise ZeroDivisionError("no cats found")

    message = r"'mine' on images 0 to 4 of shape \(5, 3, 4, 4\) on cpu, prompts 'a cat', 'a dog', 'a tree' and 2 more, raised Zero"
    with pytest.raises(RewardError, match=message) as caught:
        evaluate_reward(reward, some_images(), PROMPTS, "mine")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_that_changes_its_input_is_refused() -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mul_(255).flatten(1).mean(1)

    with pytest.raises(RewardError, match=r"changed its input in place; let it work on a copy"):
        evaluate_reward(reward, some_images(), PROMPTS, "mine")


def test_inference_tensors_are_images_too() -> None:
    with torch.inference_mode():
        images = some_images()
    torch.testing.assert_close(evaluate_reward(brightness, images, PROMPTS, "mine"), images.flatten(1).mean(1))


def test_an_interrupt_is_not_a_reward_error() -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_reward(reward, some_images(), PROMPTS, "mine")


@pytest.mark.parametrize(
    "arguments, message", [((PROMPTS[:3], None), "5 images and 3 prompts"), ((PROMPTS, 0), "chunk is 0")]
)
def test_the_caller_s_own_mistakes(arguments: tuple[list[str], int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_reward(brightness, some_images(), arguments[0], "mine", chunk=arguments[1])


@pytest.mark.parametrize("code", [0, None, 3])
def test_a_reward_that_tries_to_end_the_program_is_an_error(code: int | None) -> None:
    def leaving(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise SystemExit(code)

    with pytest.raises(RewardError, match=f"raised SystemExit: {code}"):
        evaluate_reward(leaving, torch.zeros(1, 3, 2, 2), ["a"], "leaving")
