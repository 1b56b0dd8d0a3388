"""A reward under examination: how it is called, what counts as a call gone wrong, and what a finding is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.reward_check.measures import seconds
from diffusion_rtb.scoring.call import output_problem
from diffusion_rtb.scoring.metadata import call_reward
from diffusion_rtb.scoring.remedies import remedy

__all__ = ["Broken", "Check", "Limits", "Status", "Subject"]

Status = Literal["pass", "warn", "fail", "info", "skip"]


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Status
    message: str
    """What was found and, where it is bad, what to do."""
    value: float | None = None
    """The number that was compared, if there is one."""


@dataclass(frozen=True)
class Limits:
    """From where on a finding is bad. Differences are in standard deviations of the reward over the samples."""

    repeat: float = 1e-4
    """Between two calls on the same samples."""
    difference: float = 1e-2
    """Between batches, orders and devices: networks round differently at other shapes."""
    correlation: float = 0.8
    """Rank correlation with file size or brightness; a warning."""
    images_per_second: float | None = None
    """At least; None: any speed will do."""
    memory_mib: float | None = None
    """At most; None: no limit."""


class Broken(Exception):  # noqa: N818 — what went wrong in a call, as a finding, not an error of this program
    """A call of the reward that broke the contract."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass
class Subject:
    """A reward, the samples it is checked on, and what is known of it so far."""

    reward: Any
    images: Float[Tensor, "batch *dims"]
    prompts: list[str]
    limits: Limits = field(default_factory=Limits)
    spent: list[float] = field(default_factory=list)
    """Seconds of each call on all samples."""
    values: Float[Tensor, " batch"] = field(default_factory=lambda: torch.zeros(0))
    """Of the first call, float64 on the CPU."""
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    """Of the prompts, where something is known."""

    @property
    def unit(self) -> float:
        """One standard deviation of the reward; where it does not vary, its size."""
        return float(self.values.std(correction=0)) or float(self.values.abs().max()) or 1.0

    def call(self, images: Tensor, prompts: Sequence[str]) -> Any:
        """The reward's answer as it is; one that takes metadata gets that of the prompts."""
        return call_reward(self.reward, images, list(prompts), [self.metadata.get(prompt, {}) for prompt in prompts])

    def ask(self, images: Tensor, prompts: Sequence[str], *, copy: bool = True) -> Float[Tensor, " batch"]:
        """Call the reward, on a copy of the samples unless it may change them; values in float64 on the CPU.

        Raises:
            Broken: it raised, or did not return one finite float per sample on the samples' device.
        """
        with torch.no_grad():
            try:
                values = self.call(images.clone() if copy else images, prompts)
            except (Exception, SystemExit) as error:
                told = remedy(error, self.reward, [self.metadata.get(prompt, {}) for prompt in prompts])
                raise Broken("call", f"raised {type(error).__name__}: {error}{told}") from error
        problem = output_problem(values, images, prompts)
        if problem:
            raise Broken(problem[0], f"{problem[1]}.")
        return values.detach().double().cpu()

    def ask_all(self) -> Float[Tensor, " batch"]:
        """Call the reward on all samples, on the clock."""
        with seconds(self.images.device, self.spent):
            return self.ask(self.images, self.prompts)

    def apart(self, one: Tensor, other: Tensor) -> float:
        """The largest difference, in standard deviations of the reward."""
        return float((one - other).abs().max()) / self.unit
