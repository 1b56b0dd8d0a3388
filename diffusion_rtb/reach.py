r"""What the prior's own samples say of a target before anything is trained for it: is there something to learn, who can check it.

    w_k = exp(beta·r_k),  n_eff = (sum_k w_k)² / sum_k w_k²          of the samples of one prompt

n_eff samples of the prior look like the posterior's. Below 5 neither a V learned from them, nor re-sampled trajectories, nor the
re-weighted prior that an evaluation compares with know what it is. n_eff falls with beta, so that there is a largest beta with 5.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.beta import BetaConfig
from diffusion_rtb.estimates import ess

__all__ = ["FEW", "NEXT_TO_NOTHING", "Doubts", "doubts"]

FEW = 5.0
"""Effective samples of a prompt below which they say nothing of the posterior."""

TELLING = 32
"""Samples of a prompt from which on their number is judged; where there are fewer, few of them count at any beta worth having."""

NEXT_TO_NOTHING = 0.1
"""Nats of beta·sd below which nobody will see a difference."""

HALVINGS = 50

log = logging.getLogger(__name__)


@runtime_checkable
class Rewarded(Protocol):
    """Samples of the prior, or more: rewards, and the row of each one's prompt."""

    @property
    def reward(self) -> Tensor: ...

    @property
    def prompt(self) -> Tensor: ...


class Doubts:
    """`doubts` as warnings, of the first samples that a run shows; with `kl_budget`, which finds its beta, only of flat rewards.

    Args:
        texts: The run's prompts.
        beta: Of its config.
    """

    def __init__(self, texts: Sequence[str], beta: BetaConfig) -> None:
        self.texts = texts
        self.beta = None if beta.kl_budget is not None else beta.value
        self.looked = False

    def look(self, *seen: Rewarded) -> None:
        """Say what samples of the prior say of the target, once."""
        if self.looked or not seen:
            return
        self.looked = True
        reward, prompt = torch.cat([each.reward for each in seen]), torch.cat([each.prompt for each in seen])
        for doubt in doubts(reward, prompt, self.texts, self.beta):
            log.warning("%s", doubt)


def doubts(
    reward: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], texts: Sequence[str], beta: float | None
) -> list[str]:
    """What is wrong with the target, with the beta that would fit; nothing where nothing is.

    Args:
        reward: Of samples of the prior.
        prompt: Row of each in `texts`; a prompt with a single sample is not judged.
        texts: The prompts.
        beta: Of the target, nats per unit of reward; None: not known yet.
    """
    groups = {int(row): reward[prompt == row].detach().cpu().double() for row in prompt.unique()}
    groups = {row: own for row, own in groups.items() if len(own) > 1}
    if not groups:
        return []
    spread = {row: float(own.std(correction=0)) for row, own in groups.items()}
    alike = [row for row, sd in spread.items() if sd == 0 or (beta is not None and beta * sd < NEXT_TO_NOTHING)]
    found = [_alike(alike, groups, spread, texts, beta)] if alike else []
    if beta is None:
        return found
    known = {row: own for row, own in groups.items() if len(own) >= TELLING}
    counted = {row: _effective(own, beta) for row, own in known.items()}
    few = [row for row, count in counted.items() if count < FEW]
    return [*found, *([_few(few, counted, known, texts, beta)] if few else [])]


def _alike(
    rows: list[int], groups: dict[int, Tensor], spread: dict[int, float], texts: Sequence[str], beta: float | None
) -> str:
    """There is nothing to learn at these prompts."""
    row = min(rows, key=lambda row: spread[row])
    where = _where(rows, len(groups), texts[row])
    if spread[row] == 0:
        return (
            f"The reward is {float(groups[row][0]):.6g} for each of {len(groups[row])} samples of the prior {where}: no beta "
            "re-weights samples that are all alike. Look at the reward (`diffusion-rtb check-reward`), or leave the prompt out."
        )
    assert beta is not None
    return (
        f"beta·sd of the reward is {beta * spread[row]:.2g} nats {where}: next to nothing is asked for, the posterior will be the "
        f"prior. beta={1 / spread[row]:.2g} makes it one nat there (docs/beta.md)."
    )


def _few(
    rows: list[int], counted: dict[int, float], known: dict[int, Tensor], texts: Sequence[str], beta: float
) -> str:
    """Hardly a sample of the prior is one of the posterior."""
    row = min(rows, key=lambda row: counted[row])
    fits = _rounded_down(min(_largest(own, beta) for own in known.values()))
    return (
        f"At beta {beta:g} only {counted[row]:.1f} of {len(known[row])} samples of the prior count (ESS) "
        f"{_where(rows, len(known), texts[row])}: they do not show what the posterior is. {FEW:g} or more of each prompt count up "
        f"to beta={fits:g}: take that, let beta follow with `kl_budget`, or draw more samples of the prior (docs/beta.md)."
    )


def _where(rows: list[int], prompts: int, text: str) -> str:
    others = f", worst of {len(rows)} such prompts out of {prompts}" if len(rows) > 1 else ""
    return f"for prompt {text!r}{others}"


def _effective(reward: Tensor, beta: float) -> float:
    return len(reward) * ess(beta * reward)


def _largest(reward: Tensor, beta: float) -> float:
    """The largest number up to `beta` at which `FEW` samples count."""
    low, high = 0.0, beta
    if _effective(reward, beta) >= FEW:
        return beta
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _effective(reward, middle) >= FEW else (low, middle)
    return low or high


def _rounded_down(value: float) -> float:
    """To two digits."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / digit) * digit:.2g}")
