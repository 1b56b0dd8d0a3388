"""What objectives of states that own nothing share: what is logged of them, and weights within a prompt's samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.interfaces import Loss, Samples, States, Terms
from diffusion_rtb.objectives._checks import check_beta, check_finite
from diffusion_rtb.objectives._groups import check_groups, group_log_mean_exp, same_prompt
from diffusion_rtb.objectives.rtb import RTB

__all__ = ["Aiming", "boltzmann", "checked", "target"]


class Aiming(nn.Module):
    """Base of objectives that learn from the posterior's own samples, noised anew."""

    on_policy_only = True
    noises = True
    smallest_group = 2

    def __init__(self) -> None:
        super().__init__()
        self.measure = RTB("vargrad")

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def forward(self, terms: Terms, beta: float) -> Loss:
        """What RTB says of the posterior's own trajectories, for the log: nothing is learned from it."""
        measured: Loss = self.measure(terms, beta)
        return measured


def checked(what: str, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
    """Rewards in float64; ValueError: beta is not positive, one is not finite, or a sample is alone with its prompt."""
    check_beta(beta)
    check_groups(what, samples.prompt)
    check_finite("reward", samples.reward)
    return samples.reward.double()


def boltzmann(what: str, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
    """exp(beta·r) divided by its mean over the samples of the prompt, so that nothing overflows; see `checked`."""
    log_w = beta * checked(what, samples, beta)
    member, _ = same_prompt(samples.prompt)
    log_mean = torch.where(member, group_log_mean_exp(log_w, member)[:, None], 0).sum(dim=0)
    return torch.exp(log_w - log_mean)


def target(at: States) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *ones"]]:
    """mean_0, and the weight of each sample as a factor of it."""
    assert at.mean_0 is not None
    assert at.weight is not None
    return at.mean_0, at.weight.to(at.mean_0).reshape(-1, *[1] * (at.mean_0.ndim - 1))
