r"""V(x_t) as a bounded regression, for one beta: what remains is learned as a probability.

    y = exp(beta·(r - r_max)) in (0, 1],     log F(x_t) = beta·r_max + log sigmoid(logit(x_t)),     loss = cross-entropy(y, logit)

The minimiser is E[y | x_t], that of Gumbel regression (`trust_pcl`), and no gradient can overflow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from diffusion_rtb.interfaces import Terms, Walks
from diffusion_rtb.objectives._chain_value import agree
from diffusion_rtb.objectives._value import ValueNetwork
from diffusion_rtb.objectives._value_fit import Noise, fit_value, some_states

__all__ = ["BoundedValue"]


class BoundedValue(nn.Module):
    """V(x_t) = r_max + 1/beta · log sigmoid(logit(x_t)), reward units, at the beta and the r_max that it was fitted to.

    Args:
        dims: See `ValueNetwork`.
        features: Length of a prompt's feature vector.
        width: Channels.
        blocks: Residual blocks.
    """

    ceiling: Tensor
    beta: Tensor

    def __init__(self, dims: tuple[int, ...], features: int, *, width: int, blocks: int = 0) -> None:
        super().__init__()
        self.logit = ValueNetwork(dims, features, width=width, blocks=blocks)
        self.register_buffer("ceiling", torch.zeros((), dtype=torch.float64))
        self.register_buffer("beta", torch.ones((), dtype=torch.float64))

    def log_f(
        self, x_t: Float[Tensor, "rows *dims"], t: Float[Tensor, " rows"], features: Float[Tensor, "rows features"]
    ) -> Float[Tensor, " rows"]:
        """log F(x_t) - beta·r_max, at most 0; nats."""
        return logsigmoid(self.logit(x_t, t, features))

    def forward(
        self, x_t: Float[Tensor, "rows *dims"], t: Float[Tensor, " rows"], features: Float[Tensor, "rows features"]
    ) -> Float[Tensor, " rows"]:
        """V of each state; reward units."""
        value = self.log_f(x_t, t, features)
        return self.ceiling.to(value) + value / self.beta.to(value)

    def fit(self, terms: Terms, beta: float, noise: Noise, updates: int, lr: float) -> None:
        """Learn from samples of the prior, see the module; afterwards nothing of it is trainable."""
        with torch.no_grad():
            self.ceiling.fill_(terms.reward.max())
            self.beta.fill_(beta)
            y = self._y(terms)
            mean = y.double().mean().clamp(max=1 - 1e-6)
            self.logit.start(torch.log(mean / (1 - mean)))
        fit_value(
            self.logit,
            terms,
            lambda logit, row: binary_cross_entropy_with_logits(logit, y[row]),
            noise,
            updates,
            lr,
            ends=True,
        )
        self.requires_grad_(False)

    def refit(self, walks: Walks, terms: Terms, noise: Noise, updates: int, lr: float) -> None:
        """Agree with the chain's own transitions where `walks` went, see `_chain_value.py`; `terms` and `noise` are those of `fit`.

        A walk's reward above r_max counts as r_max: F is at most that.
        """
        y = self._y(terms)

        def anchor(generator: torch.Generator) -> Float[Tensor, ""]:
            x_t, t, row = some_states(terms, noise, generator, ends=True)
            return binary_cross_entropy_with_logits(self.logit(x_t, t, terms.features[row]), y[row])

        end = (self.beta * (walks.reward.to(self.ceiling) - self.ceiling)).clamp(max=0)
        agree(self.logit, walks, end, anchor, updates, lr)
        self.requires_grad_(False)

    def _y(self, terms: Terms) -> Float[Tensor, " batch"]:
        return torch.exp(self.beta * (terms.reward.double() - self.ceiling)).to(terms.reward.dtype)
