r"""Mean and standard deviation of a scheduler's transition, asked of the scheduler itself.

Every stochastic diffusers scheduler computes x_s = mean(x_t, network output) + std·z with z from `torch.randn`. Evaluating
its own `step` with z replaced by numbers of ours gives both without a formula per scheduler:

    mean = step(z = 0)                      std = |step(z = ±c) - step(z = 0)| / c

c is a large power of two, so that the difference loses no digits to the size of the mean. Its sign changes from dimension to
dimension, so that noise which is not independent in each of them with one deviation is noticed. Both evaluations run in fp32
(or better) whatever the network's dtype, draw from no random generator, and leave the scheduler's state as it was.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.chain.noise import ProbeNoise, signs
from diffusion_rtb.chain.normal import precise
from diffusion_rtb.chain.recordable import ROLES, is_ode_step
from diffusion_rtb.not_finite import NotFiniteError

__all__ = [
    "StepCall",
    "in_place_of",
    "kept_state",
    "parameter_names",
    "previous_sample",
    "unchanged",
    "with_previous_sample",
]

PROBE = 2.0**20
EQUAL = 1e-4  # share by which deviations of one step may differ between dimensions
ROUNDINGS = 10  # that a step of a scheduler may add up
NO_NOISE = 1e-5  # no schedule steps this finely; noise from elsewhere than randn leaves about 1/PROBE here


@contextmanager
def unchanged(scheduler: Any) -> Iterator[None]:
    """Put the scheduler's attributes back afterwards: multistep schedulers remember what `step` saw."""
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)


def in_place_of(method: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """`replacement` with the name and signature of `method`: pipelines look for `eta` in the signature of `step`."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return call


def previous_sample(output: Any) -> Tensor:
    """x_s from what a scheduler's `step` returned, a tuple or an output object."""
    x_s: Tensor = output[0] if isinstance(output, tuple) else output.prev_sample
    return x_s


def with_previous_sample(output: Any, x_s: Tensor) -> Any:
    """A scheduler output, tuple or object, with its previous sample replaced."""
    if isinstance(output, tuple):
        return (x_s, *output[1:])
    output.prev_sample = x_s
    return output


class StepCall:
    """One call of a scheduler's `step` by a pipeline: what it was given, and what it answers to noise of ours.

    Args:
        scheduler: Whose state is put back after every question.
        step: Its own, unwrapped method.
        *args: As the pipeline passes them: model_output, timestep, sample, …, by position or by name.
        **kwargs: eta, generator, return_dict, …
    """

    def __init__(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.scheduler = scheduler
        self.step = step
        self.args, self.kwargs = args, kwargs
        self.residue = 0.0
        """Largest deviation of a step that counts as one without noise: DDPM clamps its last variance to 1e-20."""
        self.left_to_ode = False
        """Whether the scheduler means a step without noise to be one."""
        self.names, self.takes_noise = parameter_names(getattr(step, "__func__", step))
        self.t = self.get(self.names[1])
        """Its timestep, maybe one per row."""

    def get(self, name: str) -> Any:
        """The argument of this name, wherever it stands; None where it is not given."""
        place = self.names.index(name) if name in self.names else -1
        return self.args[place] if 0 <= place < len(self.args) else self.kwargs.get(name)

    @property
    def model_output(self) -> Tensor:
        output: Tensor = self.get(self.names[0])
        return output

    @property
    def sample(self) -> Tensor:
        x_t: Tensor = self.get(self.names[2])
        return x_t

    @property
    def timestep(self) -> float:
        """One number, also where the pipeline passes one per row. ValueError: the rows are at different timesteps."""
        t = self.t
        if not isinstance(t, Tensor) or t.numel() == 1:
            return float(t)
        values = t.unique().tolist()
        if len(values) != 1:
            raise ValueError(
                f"{self.name} was called with different timesteps in one batch, {values}: a trajectory has one schedule. "
                "Call the pipeline once per schedule."
            )
        return float(values[0])

    @property
    def name(self) -> str:
        return type(self.scheduler).__name__

    def to_host(self, copy: Callable[[Tensor], Tensor], *, passed: bool) -> None:
        """Read the timestep on the host and, unless there is one per row, pass it on from there.

        Args:
            copy: Answers a tensor of the host.
            passed: False leaves the argument itself where it is.
        """
        if not isinstance(self.t, Tensor) or self.t.device.type == "cpu":
            return
        self.t = copy(self.t)
        if passed and self.t.dim() == 0:
            args, self.kwargs = self.changed(**{self.names[1]: self.t})
            self.args = tuple(args)

    def at(self, x_t: Tensor, model_output: Tensor | None = None) -> StepCall:
        """The same call from another state, and of what the network answered there, if that is given."""
        changed = {self.names[2]: x_t} | ({} if model_output is None else {self.names[0]: model_output})
        args, kwargs = self.changed(**changed)
        call = StepCall(self.scheduler, self.step, *args, **kwargs)
        call.t = self.t
        return call

    def made(self) -> Any:
        """The call itself, as the pipeline made it: the scheduler goes on to its next step."""
        return self.step(*self.args, **self.kwargs)

    def noiseless(self) -> Any:
        """What the call answers at z = 0 in the pipeline's own dtype and kernels."""
        return self._asked(0.0)

    def mean(self) -> Any:
        """The output at z = 0 in fp32 or better, whose previous sample is the mean of x_t -> x_s; differentiable."""
        return self._asked(0.0, **self._precisely())

    @torch.no_grad()
    def std(self, mean: Tensor) -> float:
        """The standard deviation of x_t -> x_s, the same for every dimension; 0 for a deterministic step.

        Args:
            mean: Previous sample of `mean()`.

        Raises:
            NotFiniteError: something is not finite, or so large that the noise vanishes beside it: the message says what.
            ValueError: the noise is not independent with one deviation in each dimension: a network that predicts its own variance.
        """
        far = previous_sample(self._asked(PROBE, **self._precisely()))
        std = ((far.double() - mean.detach().double()) / PROBE).abs()
        low, high, median = torch.stack([std.min(), std.max(), std[0].median()]).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError(self._not_finite())
        if high < NO_NOISE:
            self.residue, self.left_to_ode = high, is_ode_step(self.scheduler, self.get(self.names[1]))
            return 0.0
        if math.isclose(low, high, rel_tol=EQUAL):
            # Rounded to the trajectory's dtype, so that a deviation read back from it is the same number: replayed = recorded.
            return float(torch.tensor(median, dtype=precise(self.sample).dtype))
        self._check_size(far, median)
        raise ValueError(
            f"{self.name} has a different standard deviation in each dimension ({low:.3g} to {high:.3g}) at timestep "
            f"{self.timestep:g}: the network predicts its variance, or the noise is not independent in each dimension. Build the "
            "scheduler with variance_type='fixed_small', or use DDIMScheduler with eta=1.0."
        )

    def _check_size(self, far: Tensor, std: float) -> None:
        """NotFiniteError: `far`, states with a noise of PROBE deviations, is so large that its rounding hides the deviation."""
        largest = float(far.abs().max())
        if ROUNDINGS * torch.finfo(far.dtype).eps * largest > EQUAL * PROBE * std:
            raise NotFiniteError(
                f"The states have come to {largest:.3g} at timestep {self.timestep:g}, where {far.dtype} cannot tell noise of "
                f"deviation {std:.3g} any more: the network leads away from where it was trained. Training has diverged: lower "
                "train.lr or beta, and begin before that."
            )

    def _precisely(self) -> dict[str, Tensor]:
        return {self.names[0]: precise(self.model_output), self.names[2]: precise(self.sample)}

    def changed(self, **changed: Any) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with some of them changed, each where it stands."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changed.items():
            place = self.names.index(name) if name in self.names else len(args)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return args, kwargs

    def _asked(self, z: float, **changed: Any) -> Any:
        """`step` with its noise replaced by ±z; the scheduler's state is put back."""
        if self.get("generator") is not None:
            changed["generator"] = None
        x_t = changed.get(self.names[2], self.sample)
        if self.takes_noise:  # four times faster than intercepting torch.randn
            size = tuple(x_t.shape)
            changed["variance_noise"] = z * signs(size, 0, x_t.dtype, x_t.device) if z else torch.zeros_like(x_t)
        args, kwargs = self.changed(**changed)
        with unchanged(self.scheduler):
            if self.takes_noise:
                return self.step(*args, **kwargs)
            with ProbeNoise(z):
                return self.step(*args, **kwargs)

    def _not_finite(self) -> str:
        """Which of the network's output, the state and the scheduler's own numbers is not finite."""
        where = f"at timestep {self.timestep:g}"
        if not self.model_output.isfinite().all():
            return (
                f"The network answered NaN or infinity {where}: {_count(self.model_output)} in {self.model_output.dtype}. Half "
                "precision may overflow: use float32; after training, lower train.lr or beta."
            )
        if not self.sample.isfinite().all():
            return (
                f"The state that the network was given {where} holds NaN or infinity: {_count(self.sample)}. "
                "Half precision may have overflowed in the step before: use float32; else look at what changes the latents."
            )
        return (
            f"{self.name} itself answers NaN or infinity {where}, from a finite network output: a network that predicts noise "
            "cannot start where no signal is left (rescale_betas_zero_snr), and variance_type fixed_large_log has no finite "
            "variance. Set rescale_betas_zero_snr: false and variance_type: fixed_small, or use DDIMScheduler with eta=1.0."
        )


COUNTERS = {"_step_index", "_begin_index", "is_scale_input_called", "num_inference_steps"}


@torch.no_grad()
def kept_state(call: StepCall) -> list[str]:
    """Names of what a scheduler remembers of a step apart from where it is in its schedule."""
    scheduler = call.scheduler
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    with unchanged(scheduler), ProbeNoise(0.0):
        call.made()
        after = dict(vars(scheduler))
    return sorted(k for k, v in after.items() if k not in COUNTERS and not _same(v, before.get(k)))


def _same(a: Any, b: Any) -> bool:
    """Identity; lists by their entries."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int | float | str) and a == b)


@functools.cache
def parameter_names(step: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """Names of the parameters of a `step` that may be given by position, and whether it takes `variance_noise`.

    Where it has fewer than three (`*args`), the first three are called as in diffusers.
    """
    parameters = [p for p in inspect.signature(step).parameters.values() if p.name != "self"]
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names + ROLES[len(names) :], any(p.name == "variance_noise" for p in parameters)


def _count(x: Tensor) -> str:
    return f"{int((~x.isfinite()).sum())} of {x.numel()} numbers"
