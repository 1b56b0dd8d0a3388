"""What every reward must keep, as one check on a reward and samples that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.scoring.call import evaluate_reward


def keeps_contract(reward: Any, images: Tensor, prompts: Sequence[str], name: str) -> Tensor:
    """Same values at every call, in every order and batch; input left alone. Returns the values."""
    before = images.clone()
    values = evaluate_reward(reward, images, prompts, name)
    assert torch.equal(images, before)
    assert values.std() > 0, "random images with the same reward"
    assert torch.equal(values, evaluate_reward(reward, images, prompts, name)), "the same call twice"

    order = torch.arange(len(images)).roll(2).flip(0)
    shuffled = evaluate_reward(reward, images[order], [prompts[i] for i in order], name)
    torch.testing.assert_close(shuffled, values[order], rtol=1e-4, atol=1e-5)
    one_by_one = evaluate_reward(reward, images, prompts, name, chunk=1)
    torch.testing.assert_close(one_by_one, values, rtol=1e-4, atol=1e-5)
    return values
