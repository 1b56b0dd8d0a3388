r"""Sampling towards a differentiable reward without training: DPS and LGD-MC, for networks that predict noise, v or x_0.

The score of the posterior is that of the prior plus grad log E[exp(beta·r(x_0)) | x_t], and by Tweedie's formula

    x0_hat(x_t)  ->  x0_hat + scale · (1 - alpha_bar) / sqrt(alpha_bar) · g,       g = grad_x log l(x_t)

makes of the prior's denoiser that of the posterior, where scale is 1 and l exact. A DDPM step's mean so moves by
beta_t / sqrt(alpha_t) · scale · g, the `classifier guidance` of Dhariwal and Nichol. What is not known is l:

    DPS        l = exp(beta·r(x0_hat))
    LGD-MC     l = mean_i exp(beta·r(x_i)),    x_i ~ Normal(x0_hat, sd²·spread²),    sd² = 1 - alpha_bar

DPS forgets that x_0 is uncertain given x_t; LGD-MC models it, exactly where the prior is Normal(., spread² I) and spread 1: then
it goes to the exact g as its samples grow. Both take r's gradient through the network, at 2 to 3 times the cost of a prior's step.

DPS: Chung, Kim, Mccann, Klasky, Ye 2023, https://arxiv.org/abs/2209.14687. LGD-MC: Song, Zhang, Yin et al. 2023,
https://proceedings.mlr.press/v202/song23k.html. Dhariwal, Nichol 2021, https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.forward_process import denoised
from diffusion_rtb.steering.rlg import output_of, with_output

__all__ = ["Guidance", "guided"]


@dataclass(frozen=True)
class Guidance:
    """What to be guided by.

    Raises:
        ValueError: scale or spread is not positive, or there are fewer than 0 samples.
    """

    log_likelihood: Callable[[Tensor], Tensor]
    """beta·r of states x_0 (batch, *dims), differentiable; (batch,), nats."""
    scale: float = 1.0
    """What g is multiplied by."""
    samples: int = 0
    """Of LGD-MC; 0: DPS."""
    spread: float = 1.0
    """Standard deviation of the data, of LGD-MC; it decides how far its samples are from x0_hat at low noise."""

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.spread > 0 and self.samples >= 0):
            raise ValueError(
                f"scale={self.scale} and spread={self.spread} must be positive and samples={self.samples} at least 0."
            )

    def of(self, x0_hat: Float[Tensor, "batch *dims"], alpha_bar: float) -> Float[Tensor, " batch"]:
        """log l by DPS or LGD-MC; nats."""
        if self.samples == 0:
            return self.log_likelihood(x0_hat)
        noise = torch.randn(self.samples, *x0_hat.shape, dtype=x0_hat.dtype, device=x0_hat.device)
        around = x0_hat + self.deviation(alpha_bar) * noise
        found = self.log_likelihood(around.flatten(0, 1)).unflatten(0, (self.samples, -1))
        return found.logsumexp(0) - math.log(self.samples)

    def deviation(self, alpha_bar: float) -> float:
        """Standard deviation of x_0 given x_t where the data are Normal with deviation `spread`."""
        variance = self.spread**2 * (1 - alpha_bar) / (self.spread**2 * alpha_bar + 1 - alpha_bar)
        return math.sqrt(variance)


@contextmanager
def guided(network: Any, scheduler: Any, guidance: Guidance) -> Iterator[None]:
    """Inside the block a denoiser answers what makes its pipeline sample towards the reward.

    Args:
        network: Called as network(x_t, t, ...), answering a tensor, a tuple or an object with `sample`.
        scheduler: With `alphas_cumprod` and a `prediction_type` of epsilon, v_prediction or sample.
        guidance: See `Guidance`.

    Raises:
        ValueError: the scheduler is of another kind.
    """
    kind = str(scheduler.config.get("prediction_type"))
    if kind not in SHIFTS or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r}: guidance by a reward needs alphas_cumprod and one of "
            f"{', '.join(SHIFTS)}."
        )
    forward = network.forward

    def answer(x_t: Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
        a = float(scheduler.alphas_cumprod[int(torch.as_tensor(t).flatten()[0])])
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            answered = forward(x, t, *args, **kwargs)
            output = output_of(answered)
            value = guidance.of(denoised(kind, x, output, math.sqrt(a), math.sqrt(1 - a)), a)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        shift = guidance.scale * (1 - a) / math.sqrt(a) * gradient
        moved = output.detach() + SHIFTS[kind](a) * shift
        return with_output(answered, moved)

    network.forward = answer
    try:
        yield
    finally:
        del network.forward


SHIFTS: dict[str, Callable[[float], float]] = {
    "epsilon": lambda a: -math.sqrt(a / (1 - a)),
    "v_prediction": lambda a: -1 / math.sqrt(1 - a),
    "sample": lambda a: 1.0,
}
"""What the network's output moves by where x0_hat moves by 1, at alpha_bar = a."""
