"""What a reward has to return: one finite number per sample in a dense float tensor on the samples' device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["output_problem"]

PEERS = "the (scores, info) of ddpo-pytorch, flow_grpo and DiffusionNFT is not taken: return the scores alone, as"


def output_problem(
    values: object, samples: Tensor, prompts: Sequence[str], kind: str = "sample", first: int = 0
) -> tuple[Literal["output", "finite"], str] | None:
    """Whether the form or the numbers of `values` are wrong, and how, with the remedy; None if nothing is.

    Args:
        values: What a reward returned.
        samples: What it was asked about, (batch, ...).
        prompts: One per sample.
        kind: What a sample is called, e.g. "image".
        first: The number of the first sample.
    """
    wrong = _form_problem(values, samples, kind)
    if wrong:
        return "output", wrong
    assert isinstance(values, Tensor)
    numbers = values.detach().to(torch.float32)  # as training takes them
    bad = (~torch.isfinite(numbers)).nonzero().flatten().tolist()
    if not bad:
        return None
    i = bad[0]
    return "finite", (
        f"is {numbers[i].item()} for {kind} {first + i}, prompt {prompts[i]!r} ({len(bad)} of {len(samples)} are not finite). "
        f"Every {kind} needs a finite reward: look at that {kind}, or bound the reward inside its class"
    )


def _form_problem(values: object, samples: Tensor, kind: str) -> str | None:
    count = len(samples)
    if not isinstance(values, Tensor):
        return _not_a_tensor(values, count)
    if values.is_nested:
        return f"returned a nested tensor; return a plain one of shape ({count},)"
    if values.layout is not torch.strided:
        return f"returned a sparse tensor ({values.layout}); return values.to_dense()"
    if values.shape == (count, 1) and count != 0:
        return (
            f"returned shape {tuple(values.shape)}; return values.squeeze(1): (batch, 1) against (batch,) would broadcast to "
            "(batch, batch)"
        )
    if values.shape != (count,):
        return f"returned shape {tuple(values.shape)}; return one number per {kind}, shape ({count},)"
    if not values.is_floating_point():
        return f"returned {values.dtype}; return a floating dtype, e.g. values.float()"
    if values.device != samples.device:
        return f"returned values on {values.device}; return values.to(images.device), which is {samples.device}"
    return None


def _not_a_tensor(values: object, count: int) -> str:
    what = f"returned a {type(values).__name__}; "
    if isinstance(values, tuple) and len(values) == 2 and not isinstance(values[0], float | int):
        return f"{what}{PEERS} a torch tensor of shape ({count},)"
    if callable(values):
        return f"{what}it makes a reward and is none: call it in your module, `reward = make()`, and name `reward`"
    if values is None:
        return f"{what}it ends without `return`; return a torch tensor of shape ({count},)"
    return f"{what}return a torch tensor of shape ({count},)"
