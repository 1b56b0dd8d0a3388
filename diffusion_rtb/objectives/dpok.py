r"""DPOK: policy gradient with a value baseline, and the KL of each transition in closed form.

    maximise  E_q[r] - alpha·KL(q || p),   alpha = 1/beta

    G_t = r                                            kl = "gaussian_loss", as published
    G_t = r - alpha · sum_{u after t} KL_u(x_u)        kl = "gaussian"
    A_t = G_t - V(x_t, t, prompt)

    loss = mean of sum_t [ max(-A_t·rho_t, -A_t·clip(rho_t)) + alpha·KL_t(x_t) ]  +  mean of beta/2 (V - G_t)²

KL_t(x_t) = |mean_q - mean_p|² / (2·std²) is differentiated through mean_q and has none of the noise of log_q - log_p. Taken alone
it is only half of the gradient of KL(q || p): a step also decides at which states the steps after it pay theirs (*future*, see
`kl_estimators`). Published DPOK leaves that out, and where KL_u(x_u) depends on x_u it then goes to q(x_s | x_t) ∝
p(x_s | x_t)·exp(beta·E_q[r | x_s]), which is not the posterior; it is where the posterior only shifts every mean (rewards linear
in x, Normal chains). "gaussian" puts the future KL into the return: its gradient is exact, its optimum the posterior.

V is a baseline: any function of x_t leaves the expected gradient as it is. It is fitted to G_t beside the policy.

Source: Fan, Watkins, Du et al. 2023, https://arxiv.org/abs/2305.16381.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_clip_range, check_policy_terms
from diffusion_rtb.objectives._policy import behaviour, clipped_loss, report
from diffusion_rtb.objectives._value import ValueNetwork, values_along

__all__ = ["DPOK"]

KL = ("gaussian_loss", "gaussian")


class DPOK(nn.Module):
    """Policy gradient, closed-form KL and value baseline, an `Objective`.

    Args:
        kl: "gaussian_loss": the KL of a step at the states where it is, as published; "gaussian": also what the step does to the
            KL of later ones, the exact gradient.
        clip_range: how far the ratio of one step may leave 1 before it gets no gradient; ratios of densities summed over dims.
        width: channels of the value network.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    on_policy_only = True
    clips_ratios = True
    uses_kl = True

    value: nn.Module | None

    def __init__(
        self, kl: Literal["gaussian_loss", "gaussian"] = "gaussian_loss", clip_range: float = 0.2, *, width: int = 32
    ) -> None:
        super().__init__()
        self.kl = check_choice("kl", kl, KL)
        self.clip_range = check_clip_range(clip_range)
        if width < 1:
            raise ValueError(f"width must be at least 1 channel, got {width}.")
        self.width = width
        self.value = None

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Create the value network; before the optimizer and before a state dict is loaded.

        Raises:
            ValueError: there is no value network for states of this shape.
        """
        self.value = ValueNetwork(dims, features, width=self.width)

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch, in reward units; `beta` in nats per unit of reward.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, no closed-form KL.
            RuntimeError: `prepare` was not called.
        """
        check_policy_terms(terms, beta, uses_kl=True)
        assert terms.kl is not None
        to_go = self.returns(terms, beta)
        value = values_along(self.value, terms, to_go.mean(), beta)
        advantage = to_go - value.detach()
        policy = clipped_loss(terms.log_q, behaviour(terms), advantage, self.clip_range)
        fit = 0.5 * beta * (value - to_go).square().mean()
        return report(policy.mean() + terms.kl.sum(dim=1).mean() / beta + fit, terms, beta, to_nats=beta)

    def returns(self, terms: Terms, beta: float) -> Float[Tensor, "batch steps"]:
        """G_t of every step, detached; reward units."""
        reward = terms.reward[:, None].expand_as(terms.log_q)
        if self.kl == "gaussian_loss":
            return reward
        assert terms.kl is not None
        kl = terms.kl.detach()
        after = kl.sum(dim=1, keepdim=True) - kl.cumsum(dim=1)
        return reward - after / beta
