"""The one place where a reward is called: what it returns is checked, never repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.scoring.counted import note
from diffusion_rtb.scoring.metadata import call_reward, takes_metadata
from diffusion_rtb.scoring.remedies import remedy
from diffusion_rtb.versions import version

__all__ = ["RewardError", "differentiable_reward", "evaluate_reward", "output_problem"]


class RewardError(RuntimeError):
    """A reward raised, or broke its contract; the message names the reward, the image and the prompt."""


def evaluate_reward(
    reward: Reward,
    images: Float[Tensor, "batch *shape"],
    prompts: Sequence[str],
    name: str,
    chunk: int | None = None,
    metadata: Sequence[Metadata] | None = None,
) -> Float[Tensor, " batch"]:
    """The rewards of a batch of images, or of whatever else the prior decodes to, float32, on their device, without gradients.

    Args:
        reward: The reward to call.
        images: In [0, 1], (batch, 3, height, width); of an analytic prior vectors (batch, dim).
        prompts: One per image.
        name: What errors call the reward.
        chunk: Images per call of the reward, where a whole batch does not fit; None calls it once.
        metadata: What is known of each image's prompt, for a reward that takes it; None: nothing.

    Raises:
        ValueError: prompts or metadata and images do not pair up, `chunk` below 1.
        RewardError: the reward raised (kept as the cause), changed its input, or returned something else than one
            finite float per image on the images' device. A failure is never turned into a number.
    """
    count = len(images)
    if len(prompts) != count:
        raise ValueError(f"{count} images and {len(prompts)} prompts: reward {name!r} needs one prompt per image.")
    if metadata is not None and len(metadata) != count:
        raise ValueError(f"{count} images and {len(metadata)} rows of metadata: reward {name!r} needs one per image.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: reward {name!r} needs at least 1 image per call, or chunk=None.")
    size = chunk or max(count, 1)
    rows = [{}] * count if metadata is None else metadata
    parts = [
        _evaluate(reward, images[cut], prompts[cut], rows[cut], name, cut.start)
        for cut in (slice(i, i + size) for i in range(0, count, size))
    ]
    note(reward, count)
    return torch.cat(parts) if parts else images.new_zeros(0, dtype=torch.float32)


def differentiable_reward(
    reward: Reward,
    images: Float[Tensor, "batch *shape"],
    prompts: Sequence[str],
    name: str,
    metadata: Sequence[Metadata] | None = None,
) -> Float[Tensor, " batch"]:
    """`evaluate_reward` of images that require gradients, with the graph, in the dtype that the reward answers.

    Raises:
        RewardError: as there; or no value depends on the images by a graph.
    """
    rows = [{}] * len(images) if metadata is None else metadata
    values = _evaluate(reward, images, prompts, rows, name, 0, grad=True)
    if not values.requires_grad:
        raise RewardError(
            f"Reward {name!r} has no gradient: what it answers does not depend on the images by a graph of torch (no_grad, detach, "
            "NumPy, rounding). Take them out; or use an objective that needs no gradient, such as rtb."
        )
    return values


def _evaluate(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    name: str,
    first: int,
    *,
    grad: bool = False,
) -> Tensor:
    """One call; `first` is the place of its first image in the whole batch."""
    kind = "image" if images.ndim == 4 else "vector"
    where = f"Reward {name!r} on {kind}s {first} to {first + len(images) - 1}"
    before = version(images)
    try:
        with torch.set_grad_enabled(grad):
            values = call_reward(reward, images, prompts, metadata)
    except (Exception, SystemExit) as error:  # SystemExit would end the run, and with code 0 as if it were done
        told = f"metadata {_shown(metadata)}, " if takes_metadata(reward) else ""
        raise RewardError(
            f"{where} of shape {tuple(images.shape)} on {images.device}, prompts {_shown(prompts)}, {told}"
            f"raised {type(error).__name__}: {error}{remedy(error, reward, metadata)}"
        ) from error
    if version(images) != before:
        raise RewardError(f"{where} changed its input in place; let it work on a copy (images.clone()).")
    problem = output_problem(values, images, prompts, kind, first)
    if problem:
        raise RewardError(f"{where} {problem[1]}.")
    return values if grad else values.detach().to(torch.float32)


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


def _shown(prompts: Sequence[object], limit: int = 3) -> str:
    rest = f" and {len(prompts) - limit} more" if len(prompts) > limit else ""
    return ", ".join(map(repr, prompts[:limit])) + rest
