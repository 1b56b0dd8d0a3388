"""What a reward's values make of the pixels: all their levels, a gradient, or no more than something cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import inner_rewards
from diffusion_rtb.reward_check import measures
from diffusion_rtb.reward_check.subject import Check, Subject
from diffusion_rtb.scoring.metadata import call_reward

__all__ = ["check_along", "check_cheap", "check_gradient", "check_levels"]


def check_levels(subject: Subject) -> Check:
    """Do pixels between 0 and 1 count? `images.to(torch.uint8)` without a factor of 255 makes every one of them 0.

    Then pictures that are darker by one level, which nobody sees, are as good as black ones.
    """
    images, values = subject.images, subject.values
    if images.ndim != 4 or float(values.std(correction=0)) == 0:
        return Check("levels", "skip", "not pictures" if images.ndim != 4 else "no values that differ")
    darker = subject.ask(images * ((measures.LEVELS - 1) / measures.LEVELS), subject.prompts)
    if not torch.equal(darker, subject.ask(torch.zeros_like(images), subject.prompts)):
        return Check("levels", "pass", "pixels between 0 and 1 count")
    if torch.equal(darker, values):
        return Check("levels", "fail", "black pictures have the same values: the reward does not look at its images")
    message = (
        "only pixels of exactly 1 count, as after images.to(torch.uint8): images are in [0, 1] here, so use "
        "(images * 255).round().to(torch.uint8)"
    )
    return Check("levels", "fail", message)


def check_gradient(subject: Subject, count: int = 4) -> Check:
    """Gradients with respect to samples: none are needed here, but where there are some they should be right."""
    try:
        found = measures.slope(subject.call, subject.images[:count], subject.prompts[:count])
    except (Exception, SystemExit) as error:  # noqa: BLE001 — whatever a reward raises is a finding
        return Check("gradient", "info", f"none: asked for, the reward raised {type(error).__name__}: {error}")
    if found is None:
        return Check(
            "gradient",
            "info",
            "none: the values carry none (RTB and Trust-PCL need none; some rewards have `grad: true`)",
        )
    without, having = _parts(subject, count)
    if without and having:
        message = (
            f"that of {', '.join(having)} alone: {', '.join(without)} {'has' if len(without) == 1 else 'have'} none"
        )
        return Check("gradient", "warn", f"{message}, so it is not the gradient of the whole")
    if math.isnan(found.promised):
        return Check("gradient", "warn", "not finite for some samples")
    if found.promised == 0:
        return Check("gradient", "warn", "zero everywhere, though the values carry one")
    if abs(found.promised) < 1e-5 * float(subject.values.abs().max()):
        return Check("gradient", "info", "available; too small to be checked against a difference")
    if not 0.7 <= found.ratio <= 1.3:
        message = (
            f"available, but small steps bring {found.ratio:.2f} of what it promises: it may be another function's"
        )
        return Check("gradient", "warn", message, found.ratio if math.isfinite(found.ratio) else None)
    return Check(
        "gradient", "info", f"available; a small step brings {found.ratio:.2f} of what it promises", found.ratio
    )


def _parts(subject: Subject, count: int) -> tuple[list[str], list[str]]:
    """Names of the rewards inside of a reward whose values carry no gradient, and of those whose do."""
    found: dict[bool, list[str]] = {False: [], True: []}
    prompts = subject.prompts[:count]
    rows = [subject.metadata.get(prompt, {}) for prompt in prompts]
    for name, reward in _inner(subject.reward):
        with torch.enable_grad():
            try:
                values = call_reward(reward, subject.images[:count].clone().requires_grad_(), prompts, rows)
            except (Exception, SystemExit):  # noqa: BLE001 — some refuse images that ask for gradients
                values = None
        found[isinstance(values, Tensor) and values.requires_grad].append(name)
    return found[False], found[True]


def _inner(reward: Any) -> Iterator[tuple[str, Any]]:
    """The innermost rewards, by name."""
    for name, one in inner_rewards(reward).items():
        deeper = list(_inner(one))
        yield from deeper or [(str(name), one)]


def check_cheap(what: str, measure: Callable[[Tensor], Tensor], subject: Subject) -> Check:
    """Does the reward go along with something cheap? Then that is what training will find first."""
    if subject.images.ndim != 4 or subject.images.shape[1] != 3:
        return Check(what, "skip", "not pictures")
    return check_along(what, subject.values, measure(subject.images), subject.limits.correlation)


def check_along(
    what: str, values: Float[Tensor, " batch"], other: Float[Tensor, " batch"], limit: float | None = None
) -> Check:
    """Rank correlation of a reward's values with other numbers about the same samples; a warning from `limit` on."""
    rho = measures.spearman(values, other)
    if rho is None:
        return Check(what, "skip", "no correlation: one of the two does not vary")
    if limit is not None and abs(rho) >= limit:
        way = "raising" if rho > 0 else "lowering"
        message = f"rank correlation {rho:+.2f}: a higher reward may come from no more than {way} {what}"
        return Check(what, "warn", message, rho)
    return Check(what, "info", f"rank correlation {rho:+.2f}", rho)
