"""The published pipelines, written out with Pillow, and what every differentiable reward is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Normalize, ToTensor
from torchvision.transforms import functional as TF

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

BICUBIC = Image.Resampling.BICUBIC

PROMPTS = ["a cat emoji", "a dog emoji", "a cat emoji", "an emoji, flat style", "a blue thing"]


def pictures(images: Tensor) -> list[Image.Image]:
    """The images' 8-bit files."""
    return [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]


def shrunk(picture: Image.Image, height: int, width: int) -> Image.Image:
    """`picture.resize`, rows before columns as in Pillow up to 12; Pillow 13 decides by the sizes (see `_resample`)."""
    rows = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return rows.resize((width, height), Image.Resampling.BICUBIC)


def cropped(images: Tensor, side: int) -> Tensor:
    """As OpenAI's CLIP, ImageReward and PickScore take images: shorter side to `side`, centre crop, normalise."""
    return torch.stack([_cropped(picture, side) for picture in pictures(images)])


def _cropped(picture: Image.Image, side: int) -> Tensor:
    short = min(picture.size)
    small = shrunk(picture, int(side * picture.height / short), int(side * picture.width / short))
    return Compose([CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])(small)


def padded(images: Tensor, side: int) -> Tensor:
    """As HPSv2 takes images: made floats, longer side to `side` without rounding or clamping, black at both ends, normalise."""
    return torch.stack([_padded(TF.to_tensor(picture), side) for picture in pictures(images)])


def _padded(image: Tensor, side: int) -> Tensor:
    height, width = image.shape[1:]
    scale = side / float(max(height, width))
    small_height, small_width = round(height * scale), round(width * scale)
    # Pillow's pictures of floats: antialiased, a = -1/2, neither rounded nor clamped, and no code of torchvision's.
    resized = [Image.fromarray(channel.numpy()).resize((small_width, small_height), BICUBIC) for channel in image]
    square = torch.zeros(3, side, side)
    top, left = (side - small_height) // 2, (side - small_width) // 2
    square[:, top : top + small_height, left : left + small_width] = torch.from_numpy(
        np.stack([np.asarray(channel) for channel in resized])
    )
    return TF.normalize(square, list(MEAN), list(STD))


def check_pixel_gradient(
    reward: Callable[[Tensor, Sequence[str]], Tensor],
    images: Tensor,
    prompts: Sequence[str],
    found: Tensor,
    wanted: Tensor,
) -> None:
    """`found.grad` is `wanted.grad`, and what the reward itself does when the pixels that matter most change by one level."""
    assert wanted.grad is not None
    assert found.grad is not None
    assert found.grad.abs().max() > 0
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4 * float(wanted.grad.abs().max()))

    # The pixels that matter most, one level up or down along their signs.
    size = found.grad.abs().flatten(1)
    step = found.grad.sign() * (size >= size.topk(16).values[:, -1:]).view_as(found) / 255
    with torch.no_grad():
        difference = (reward(images + step, prompts) - reward(images - step, prompts)) / 2
    torch.testing.assert_close(difference, (found.grad * step).sum((1, 2, 3)), rtol=0.05, atol=1e-4)


def check_gradient(
    reward: Any, oracle: Callable[[Tensor, Sequence[str]], Tensor], side: int, prompts: Sequence[str] = PROMPTS
) -> None:
    """d r / d images is the oracle's on images of the network's size, and is what a change by one 8-bit level does.

    Args:
        reward: One that was built with `grad=True`.
        oracle: The same score of *normalised* images.
        side: The network's input, pixels.
        prompts: One per image.
    """
    generator = torch.Generator().manual_seed(5)
    # Away from 0 and 1 by more than the steps below, on the levels of 8-bit files.
    images = torch.randint(20, 236, (len(prompts), 3, side, side), generator=generator) / 255
    wanted, found = images.clone().requires_grad_(), images.clone().requires_grad_()
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    expected = oracle((wanted - mean) / std, prompts)
    values = reward(found, prompts)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    values.sum().backward()
    check_pixel_gradient(reward, images, prompts, found, wanted)

    # torch takes other kernels where nothing is recorded: the last bits may differ, and no more.
    torch.testing.assert_close(values.detach(), reward(images, prompts), rtol=1e-5, atol=1e-6)
    assert torch.is_grad_enabled()
    reward.grad = False
    assert not reward(found, prompts).requires_grad
    assert all(parameter.grad is None for parameter in parameters(reward))


def parameters(reward: Any) -> list[torch.nn.Parameter]:
    """Of the networks inside a reward."""
    held = [*vars(reward).values(), *vars(getattr(reward, "clip", None) or object.__new__(_Empty)).values()]
    found = [p for value in held if isinstance(value, torch.nn.Module) for p in value.parameters()]
    assert found
    return found


class _Empty:
    pass
