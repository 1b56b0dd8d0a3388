"""A reward on the frames of a video: each alone, with its own prompt and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build
from diffusion_rtb.scoring.call import evaluate_reward


def level(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean level times what the prompt and its row say; sees one frame at a time."""
    assert images.shape[2:] == (4, 6)
    scale = torch.tensor([len(prompt) * row["scale"] for prompt, row in zip(prompts, metadata, strict=True)])
    return images.mean((1, 2, 3)) * scale


@pytest.mark.parametrize("over", ["mean", "min"])
def test_frames_are_judged_one_by_one(over: str) -> None:
    videos, prompts, rows = torch.rand(2, 5, 3, 4, 6), ["a", "bcd"], [{"scale": 2.0}, {"scale": 0.5}]
    reward = build(
        {"component": "frames", "reward": {"component": f"{__name__}:level"}, "count": 5, "over": over}, "reward"
    )
    tall = torch.cat(videos.unbind(1), dim=2)
    found = evaluate_reward(reward, tall, prompts, "frames", metadata=rows)
    each = torch.stack([level(videos[:, i], prompts, rows) for i in range(5)])
    torch.testing.assert_close(found, each.mean(0) if over == "mean" else each.amin(0))


def test_pictures_that_hold_no_such_frames_are_refused() -> None:
    reward = build({"component": "frames", "reward": {"component": "brightness"}, "count": 3}, "reward")
    with pytest.raises(ValueError, match=r"pictures of 8 x 4 pixels do not hold 3 frames.*prior\.num_frames"):
        reward(torch.rand(1, 3, 8, 4), [""])
    with pytest.raises(ValueError, match="at least one frame"):
        build({"component": "frames", "reward": {"component": "brightness"}, "count": 0}, "reward")
