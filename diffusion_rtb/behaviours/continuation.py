"""Sample the rest of a trajectory whose first states are given, through the stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_rtb.interfaces import Prior
from diffusion_rtb.recorder import TrajectoryRecorder, with_previous_sample
from diffusion_rtb.rollout import LOG_DENSITY
from diffusion_rtb.seeds import generators, global_seed, seed_of
from diffusion_rtb.trajectory import Trajectory
from diffusion_rtb.transition import previous_sample, transition_mean

__all__ = ["continued"]


def continued(
    prior: Prior, prompts: Sequence[str], seeds: Sequence[int], states: Float[Tensor, "batch known *dims"]
) -> Trajectory:
    """Trajectories that begin with these states and go on as the network as it is now samples; no gradients.

    The given transitions are scored on the way, so that log-densities are known of all steps for one pass of the network.

    Args:
        prior: Samples the posterior, or the prior inside `with prior.as_prior()`.
        prompts: One per trajectory.
        seeds: One per trajectory, for the noise of the steps that are sampled.
        states: x_T and those that follow it.

    Returns:
        The trajectories, with float64 log-densities in nats. The density they were drawn with depends on where the given states
        come from and is not known here: `log_behaviour` is NaN.
    """
    pipe = prior.pipe
    takes = inspect.signature(type(pipe).__call__).parameters
    call = prior.arguments(prompts) | {"generator": generators(seeds)}
    if "output_type" in takes:
        call["output_type"] = "latent"
    recorder = Continuation(pipe.scheduler, states)
    with torch.no_grad(), global_seed(seed_of(0, *seeds)), recorder, ExitStack() as stack:
        if "latents" in takes:  # the pipeline multiplies by init_noise_sigma
            call["latents"] = states[:, 0] / float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
        else:
            stack.enter_context(GivenNoise(states[:, 0]))
        pipe(**call)
    trajectory = recorder.trajectory
    unknown = torch.full_like(trajectory.log_prob, torch.nan)
    return Trajectory(**trajectory.tensors() | {"log_behaviour": unknown})


class Continuation(TrajectoryRecorder):
    """A recorder that gives the pipeline known states first.

    Args:
        scheduler: The pipeline's scheduler.
        states: x_T, which the pipeline is to start from, and the states that follow it.
    """

    def __init__(self, scheduler: Any, states: Float[Tensor, "batch known *dims"]) -> None:
        super().__init__(scheduler, dtype=LOG_DENSITY)
        self.states = states

    def _record(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        following = len(self._std) + 1
        if following >= self.states.shape[1]:
            return super()._record(model_output, timestep, sample, *args, **kwargs)
        call = (model_output, timestep, sample, *args)
        with torch.no_grad():
            mean = previous_sample(transition_mean(self.scheduler, self._step, *call, **kwargs))
            std = self._deviation(call, kwargs)
        x_s = self.states[:, following].to(sample)
        self._append(float(timestep), sample.detach(), x_s, mean, std)
        # The scheduler steps all the same: it counts, and draws from generators that later steps go on with.
        return with_previous_sample(self._step(*call, **kwargs), x_s)


class GivenNoise(TorchFunctionMode):
    """The first draw of x_T answers what is given, for pipelines without `latents`: drawn at once or row by row.

    It is drawn all the same, so that the generators go on as they would have.
    """

    def __init__(self, x_T: Float[Tensor, "batch *dims"]) -> None:
        super().__init__()
        self.rows = list(x_T.split(1))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func is torch.randn and self.rows:
            size = tuple(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            one = tuple(self.rows[0].shape)
            if size == (len(self.rows), *one[1:]):
                answer, self.rows = torch.cat(self.rows), []
                return answer
            if size == one:
                return self.rows.pop(0)
        return drawn
