"""What can be wrong with a reward, one check each: what it returns, what it changes, what its values depend on.

A check fails where training would go wrong. It warns where it may, and says what to look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.reward_check import measures
from diffusion_rtb.reward_check.subject import Broken, Check, Subject
from diffusion_rtb.scoring.remedies import ORDER, texts_first

__all__ = [
    "check_broken",
    "check_calls",
    "check_device",
    "check_memory",
    "check_one_by_one",
    "check_order",
    "check_precision",
    "check_prompts",
    "check_repeat",
    "check_speed",
    "check_spread",
    "settings_kept",
]

TRAINING = 1000, 32
"""Iterations and samples per iteration by which speed is told."""

WORTH_SAYING, SLOW = 0.1, 1.0
"""Hours of such a training: from where on they are said, and from where on they are a warning."""

UNLIKELY = 8_128_496
"""A seed that no reward will choose itself."""


def check_calls(subject: Subject) -> list[Check]:
    """The first call: what it returns, and whether samples and torch's settings are as before."""
    if texts_first(subject.reward):
        raise Broken("call", f"its first parameter is for prompts by its name: {ORDER}")
    images = subject.images.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNLIKELY)
        before, random = settings(), torch.get_rng_state()
        with measures.seconds(images.device, subject.spent):
            subject.values = subject.ask(images, subject.prompts, copy=False)
        changed = {name: value for name, value in settings().items() if value != before[name]}
        drawn = not torch.equal(random, torch.get_rng_state())
    found = [
        Check("output", "pass", f"one float per sample, shape ({len(images)},), on {images.device}"),
        Check("finite", "pass", "all values are finite"),
    ]
    if torch.equal(images, subject.images):
        found.append(Check("input", "pass", "samples are as before"))
    else:
        found.append(Check("input", "fail", "the reward changed its samples in place: let it work on images.clone()"))
    if changed:
        found.append(
            Check("settings", "fail", f"the reward left torch with other settings: {changed}; let it put them back")
        )
    elif drawn:
        message = "the reward draws from torch's global generator, or seeds it: give it a torch.Generator of its own"
        found.append(Check("settings", "warn", message))
    else:
        found.append(Check("settings", "pass", "torch's settings and random state are as before"))
    return found


def settings() -> dict[str, Any]:
    """What of torch a reward could leave changed for the whole program."""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's settings back after the block."""
    before = settings()
    try:
        yield
    finally:
        torch.set_default_dtype(before["default dtype"])
        torch.set_num_threads(before["threads"])
        torch.use_deterministic_algorithms(before["deterministic algorithms"])


def check_spread(subject: Subject) -> Check:
    """Do the values tell samples apart?"""
    values = subject.values
    std, size = float(values.std(correction=0)), float(values.abs().max())
    if std <= 1e-6 * size:
        message = f"all {len(values)} values are {float(values[0]):.6g}: nothing can be learned from them"
        return Check("spread", "fail", message + _wanted_levels(subject), std)
    common, count = values.unique(return_counts=True)
    most = int(count.max())
    if most > len(values) / 2:
        message = f"{most} of {len(values)} samples have the value {float(common[count.argmax()]):.4g}: no direction among them"
        return Check("spread", "warn", message, std)
    return Check(
        "spread",
        "pass",
        f"{len(common)} different values; beta = {1 / std:.3g} makes one standard deviation one nat",
        std,
    )


def _wanted_levels(subject: Subject) -> str:
    """Whether a reward tells samples apart that are 255 times as bright, in words."""
    if subject.images.ndim != 4:
        return ""
    try:
        values = subject.ask(255 * subject.images, subject.prompts)
    except Broken:
        return ""
    if float(values.std(correction=0)) <= 1e-3 * float(values.abs().max()):
        return ""
    return "; with images * 255 they differ: images are in [0, 1] here, so multiply them by 255 in the reward"


def check_repeat(subject: Subject) -> Check:
    """The same samples again, twice."""
    apart = max(subject.apart(subject.ask_all(), subject.values) for _ in range(2))
    bad = f"two calls on the same samples differ by {apart:.2g} standard deviations: dropout, or noise of its own"
    return _compared("repeat", apart, subject.limits.repeat, "the same samples, the same values", bad)


def _compared(name: str, apart: float, limit: float, good: str, bad: str) -> Check:
    """A failure beyond the limit."""
    return Check(name, "fail", bad, apart) if apart > limit else Check(name, "pass", good, apart)


def check_one_by_one(subject: Subject) -> Check:
    """Each sample alone."""
    pairs = zip(subject.images.split(1), subject.prompts, strict=True)
    alone = torch.cat([_alone(subject, image, prompt) for image, prompt in pairs])
    apart = subject.apart(alone, subject.values)
    good = f"one by one as all at once, up to {apart:.1g} standard deviations"
    bad = (
        f"one by one differs from all at once by {apart:.2g} standard deviations: a value must not depend on the rest of the "
        "batch (batch statistics, ranks, padding)"
    )
    return _compared("one by one", apart, subject.limits.difference, good, bad)


def _alone(subject: Subject, image: Tensor, prompt: str) -> Tensor:
    try:
        return subject.ask(image, [prompt])
    except Broken as found:
        raise Broken("one by one", f"a single sample: {found}") from found


def check_order(subject: Subject) -> Check:
    """The same pairs of sample and prompt in other orders."""
    count = len(subject.images)
    worst = 0.0
    for order in (torch.arange(count).flip(0), torch.arange(count).roll(1)):
        places = order.to(subject.images.device)
        values = subject.ask(subject.images[places], [subject.prompts[i] for i in order.tolist()])
        worst = max(worst, subject.apart(values, subject.values[order]))
    good = f"any order, the same values, up to {worst:.1g} standard deviations"
    bad = f"another order changes values by {worst:.2g} standard deviations: a value must not depend on its place"
    return _compared("order", worst, subject.limits.difference, good, bad)


def check_prompts(subject: Subject) -> Check:
    """The same samples, each with another's prompt: does the reward read prompts?"""
    if len(set(subject.prompts)) < 2:
        return Check("prompts", "skip", "all samples have the same prompt")
    shifted = subject.prompts
    for _ in range(len(shifted)):
        shifted = [*shifted[1:], shifted[0]]
        if all(a != b for a, b in zip(shifted, subject.prompts, strict=True)):
            break
    values = subject.ask(subject.images, shifted)
    apart = subject.apart(values, subject.values)
    if apart <= subject.limits.difference:
        return Check("prompts", "info", "not used: other prompts, the same values", apart)
    better = float((subject.values > values).double().mean())
    return Check(
        "prompts", "info", f"used: {better:.0%} of the samples score higher with their own prompt than another's", apart
    )


def check_broken(subject: Subject) -> Check:
    """A sample of NaN, as a decoder may give: rounded to 8 bits it is a black picture, and must not be rewarded as one."""
    images = subject.images.clone()
    images[0] = torch.nan
    try:
        value = float(subject.ask(images, subject.prompts)[0])
    except Broken:
        return Check("broken", "pass", "a sample of NaN gets no value")
    message = f"a sample of NaN gets {value:.4g}: let the NaN through, or raise, so that training stops"
    return Check("broken", "warn", message, value)


def check_precision(subject: Subject) -> Check:
    """Samples in other precisions: which are accepted, and how far values move."""
    found = []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            apart = subject.apart(subject.ask(subject.images.to(dtype), subject.prompts), subject.values)
            found.append(f"{name} {apart:.1g}")
        except Broken:
            found.append(f"{name} refused")
    return Check(
        "precision", "info", f"samples in float32; in others values move by (standard deviations): {', '.join(found)}"
    )


def check_device(subject: Subject, other: torch.device | None) -> Check:
    """Samples on another device: the reward follows them, and comes back."""
    here = subject.images.device
    if other is None:
        return Check("device", "skip", f"checked on {here} alone: there is no other device here")
    there = subject.ask(subject.images.to(other), subject.prompts)
    back = subject.ask(subject.images, subject.prompts)
    apart = max(subject.apart(values, subject.values) for values in (there, back))
    good = f"{here} and {other} agree up to {apart:.1g} standard deviations"
    bad = f"{here} and {other} differ by {apart:.2g} standard deviations"
    return _compared("device", apart, subject.limits.difference, good, bad)


def check_speed(subject: Subject) -> Check:
    """Samples per second, the median of the calls on all samples after the first, and what that means for a training."""
    spent = sorted(subject.spent[1:] or subject.spent)
    rate = len(subject.images) / max(spent[len(spent) // 2], 1e-9)
    message = f"{rate:.3g} samples/s in batches of {len(subject.images)} (first call {subject.spent[0]:.2g} s)"
    hours = TRAINING[0] * TRAINING[1] / rate / 3600
    if hours >= WORTH_SAYING:
        message += f"; {TRAINING[0]:,} iterations of {TRAINING[1]} samples spend {hours:.2g} hours in it"
    wanted = subject.limits.images_per_second
    if wanted is not None and rate < wanted:
        return Check("speed", "fail", f"{message}; at least {wanted:g} were asked for", rate)
    if hours >= SLOW:
        return Check("speed", "warn", f"{message}: larger batches, an accelerator or `serve-reward` elsewhere", rate)
    return Check("speed", "pass" if wanted is not None else "info", message, rate)


def check_memory(subject: Subject, mib: float, what: str) -> Check:
    """Memory of the first call beyond what the loaded reward had taken."""
    message = f"{mib:.0f} MiB more {what} at its peak, for {len(subject.images)} samples"
    allowed = subject.limits.memory_mib
    if allowed is not None and mib > allowed:
        return Check("memory", "fail", f"{message}; at most {allowed:g} were allowed", mib)
    return Check("memory", "pass" if allowed is not None else "info", message, mib)
