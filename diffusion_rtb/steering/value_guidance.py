"""Steps that are moved up the gradient of a value."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Unpack

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from diffusion_rtb.chain.normal import normal_log_prob
from diffusion_rtb.chain.scheduler import StepCall, previous_sample, with_previous_sample
from diffusion_rtb.needs import instead
from diffusion_rtb.steering._aim import Aim, Kind, State
from diffusion_rtb.steering._method import Drawing, Method
from diffusion_rtb.steering._particles import Particles, resampled

__all__ = ["ValueGuidance"]


class ValueGuidance(Method):
    r"""A step's mean moves by scale·std²·beta·grad V(mean), V the learned value of the state that the step leads to.

    x_s ~ Normal(mean_p + scale·std²·beta·grad V_s(mean_p), std²) is the posterior's step to first order in std², exactly where V_s
    is linear. It needs V, learned by `value_gradient`, or by `trust_pcl` with a `length`, and no gradient of the reward; the step
    to x_0 is the prior's.

    Both densities of each step are known, the prior's as `log_prob` and the guided one as `log_behaviour`, so that what guidance
    does wrong is made up for by weights: with more than one particle they are re-sampled as in `smc`, by

        w = exp(beta·(V(x_s) - V(x_t)))·p(x_s | x_t) / guided(x_s | x_t)

    and log Z is unbiased with any number of them.

    Args:
        scale: Of the move; 1 is that of the equation above.
        particles: Of a group; 1: no re-sampling, samples are as guidance makes them.
        threshold: See `SMC`.

    Sources: guidance by a classifier, Dhariwal, Nichol 2021, https://arxiv.org/abs/2105.05233; by a soft value, Uehara et al. 2024,
    https://arxiv.org/abs/2407.13734; weighed, Wu et al. 2023, https://arxiv.org/abs/2306.17775
    """

    value: Kind = "learned"

    def __init__(
        self,
        scale: Annotated[float, Field(gt=0)] = 1.0,
        particles: PositiveInt = 1,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ) -> None:
        self.scale = scale
        self.particles = self.kept = particles
        self.threshold = threshold

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """See `Method`.

        Raises:
            ValueError: `aim` has no `value` of its own.
        """
        if aim.value is None:
            raise ValueError(
                "value_guidance takes the gradient of a value of x_t itself, and the aim has none: give Aim(..., value=V), V "
                f"learned by value_gradient, or by trust_pcl with a length. {instead('value', 'steering')}"
            )
        return _Guided(
            pipe.scheduler,
            aim,
            self.scale,
            size=self.particles,
            choose=resampled(self.threshold),
            every=1 if self.particles > 1 else None,
            **drawing,
        )


class _Guided(Particles):
    """Particles whose steps are moved by the gradient of the value."""

    def __init__(self, scheduler: Any, aim: Aim, scale: float, **settings: Any) -> None:
        super().__init__(scheduler, aim, **settings)
        self.scale = scale

    def _transit(self, call: StepCall) -> Any:
        i = len(self.steps)
        mean, std = self._transition(call)
        following = self._first + i + 1
        moves = std > 0 and following < self._first + self._length
        shift = std**2 * self.scale * self._gradient(mean, following, i + 1) if moves else torch.zeros_like(mean)
        with self._row_by_row(call):
            output = call.made()
        if moves:
            output = with_previous_sample(output, (previous_sample(output) + shift).to(call.sample.dtype))
        output = self._append(call, output, mean, std)
        made = self.steps[-1]
        drawn = made.log_prob if std == 0 else normal_log_prob(made.x_s, mean + shift, std, self.dtype)
        self.steps[-1] = replace(made, log_behaviour=drawn)
        self._log_w += (made.log_prob - drawn).cpu().double().unflatten(0, self._log_w.shape)
        return output

    def _gradient(self, mean: Float[Tensor, "rows *dims"], place: int, step: int) -> Float[Tensor, "rows *dims"]:
        """beta·grad V of the state that the step leads to, at its mean."""
        assert self.aim.value is not None
        t = float(self.scheduler.timesteps[place])

        def unknown() -> Tensor:
            raise ValueError(
                "value_guidance asks for V before the network has seen the state, so V cannot be made of x0_hat: use a learned one."
            )

        with torch.enable_grad():
            x = mean.detach().requires_grad_()
            value = self.aim.value(State(x, t, step, 0.0, unknown)).sum()
            (gradient,) = torch.autograd.grad(value, x)
        return self.aim.beta * gradient
