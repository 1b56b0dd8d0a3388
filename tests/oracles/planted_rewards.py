"""Rewards with one fault each, and what `check-reward` must say of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def good(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Differentiable, reads its prompts, goes along with neither size nor brightness."""
    red, green, _ = images.float().flatten(2).mean(2).unbind(1)
    # Exact in float32, so that no batch rounds differently.
    return red - green + torch.tensor([len(p) % 3 for p in prompts], device=images.device) / 64


def raises(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise ZeroDivisionError("no cats [found]")


def a_list(images: Tensor, prompts: Sequence[str]) -> Any:
    return good(images, prompts).tolist()


def column(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts)[:, None]


def scalar(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts).mean()


def integers(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (100 * good(images, prompts)).long()


def elsewhere(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts).to("meta")


def nan_for_one(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts).index_fill(0, torch.tensor([3]), float("nan"))


def infinite(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts) / 0


def in_place(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images.mul_(0.5), prompts)


def leaves_float64(images: Tensor, prompts: Sequence[str]) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return good(images, prompts)


def seeds(images: Tensor, prompts: Sequence[str]) -> Tensor:
    torch.manual_seed(0)
    return good(images, prompts)


def constant(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.full((len(images),), 0.7)


def constant_up_to_rounding(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 1000 + 1e-4 * good(images, prompts)


def saturated(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts).clamp(min=0.1)


def noisy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts) + 0.01 * torch.randn(len(images))


class Counting:
    """Another value at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        return good(images, prompts) + self.calls


def batch_statistics(images: Tensor, prompts: Sequence[str]) -> Tensor:
    values = good(images, prompts)
    return values - values.mean()


def batch_of_one(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts)[:, None].squeeze()


def normalised_by_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
    values = good(images, prompts)
    return values / (values - values.mean()).square().mean().sqrt()


def by_place(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images, prompts) + 0.1 * torch.arange(len(images))


class Running:
    """Each value leans on the one before it in the batch."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = good(images, prompts)
        return values + 0.5 * values.roll(1)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def of_black(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A broken picture is a black one to it."""
    return good(images.nan_to_num(0.0), [""] * len(images))


def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
    time.sleep(0.01 * len(images))
    return good(images, prompts)


def greedy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    held = torch.ones(len(images), 4 * 2**20)  # 16 MiB per image
    time.sleep(0.02)
    return good(images, prompts) + 0 * held[:, 0]


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


def wrong_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    found: Tensor = _Tripled.apply(good(images, prompts))
    return found


def detached(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    return samples.detach().flatten(1).sum(1)


def no_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images.detach(), prompts)


def zero_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return good(images.detach(), prompts) + 0 * images.flatten(1).sum(1)


def infinite_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (
        good(images.detach(), prompts) + 0 * images.flatten(1)[:, 0].sub(images.flatten(1)[:, 0].detach()).abs().sqrt()
    )


def root(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Of what is 0 in every image: finite, with a gradient that is not."""
    return (images - images.detach()).abs().flatten(1).sum(1).sqrt()


def refuses_gradients(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.from_numpy(good(images, prompts).numpy())


def refuses_half(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if images.dtype in (torch.float16, torch.bfloat16):
        raise TypeError("float32 only")
    return good(images, prompts)
