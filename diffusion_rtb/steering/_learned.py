"""V(x_t, t, prompt), as an objective has learned it, for the value of a state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.needs import instead
from diffusion_rtb.steering._aim import Kind, State

__all__ = ["value_of"]


def value_of(
    kind: Kind,
    network: Callable[..., Tensor] | None,
    features: Float[Tensor, "rows features"],
    reward: Callable[[Tensor], Tensor],
) -> Callable[[State], Tensor] | None:
    r"""The value that a method asks for; None: r(x0_hat), which an `Aim` has itself.

        learned    V(x_t, t, prompt)
        both       s·r(x0_hat) + (1 - s)·V(x_t, t, prompt),    s the signal's share of x_t

    V knows what early states lead to on average, r(x0_hat) is sharper where x_0 is nearly decided, and exact at the end.

    Args:
        kind: Which.
        network: V, in reward units; None: there is none.
        features: `Prior.features` of each row's prompt.
        reward: r of states x_0.

    Raises:
        ValueError: a V is asked for, and there is none.
    """
    if kind == "reward":
        return None
    if network is None:
        raise ValueError(
            f"value={kind!r} needs a V that was learned, and there is none: train with value_gradient, or with trust_pcl and a "
            f"length; or use value: reward. {instead('value', 'steering')}"
        )

    def learned(state: State) -> Tensor:
        t = torch.full((len(state.x_t),), state.timestep, device=state.x_t.device)
        return network(state.x_t, t, features)

    def both(state: State) -> Tensor:
        return state.signal * reward(state.x_0) + (1 - state.signal) * learned(state)

    return learned if kind == "learned" else both
