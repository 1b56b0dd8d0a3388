"""Every scheduler that diffusers exports, tried in miniature: what a recorder makes of it, and what a config does."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_rtb import schedulers
from diffusion_rtb.chain.recordable import DeterministicStepError, check_single_step, samples_flows
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay
from pipelines._diffusers.scheduler import build_scheduler, check_sampler
from tests.oracles.loops import DIMS, LATENT, SAMPLERS, Loop

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"
BEGIN, END = "<!-- every scheduler: written by tests.measurements.scheduler_table -->", "<!-- end -->"
STEPS = 5

NOT_OURS = {
    "AmusedScheduler": "steps over tokens",
    "BlockRefinementScheduler": "steps over tokens",
    "DiscreteDDIMScheduler": "steps over tokens",
    "EntropyBoundScheduler": "steps over tokens",
    "VQDiffusionScheduler": "steps over tokens",
    "HeliosDMDScheduler": "steps of its own pipeline, in stages of rising resolution",
    "HeliosScheduler": "steps of its own pipeline, in stages of rising resolution",
    "PiflowScheduler": "its network answers a policy for many steps at once",
    "RFD4ProteinaScheduler": "steps over the coordinates of proteins",
    "SCMScheduler": "steps of its own pipeline, two of them",
}
"""Those that cannot even be asked: the loop of an image pipeline fails with them."""

NEEDS = {"torchsde": ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")}
"""Packages that some need."""


class Draws(TorchFunctionMode):
    """Keeps what `torch.randn` answers inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            self.seen.append(answer)
        return answer


def names() -> list[str]:
    return [*schedulers.__all__, *(name for name in dir(diffusers) if name.endswith("Scheduler"))]


def settings_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the class and of its `step` that make it draw noise, where it can."""
    found = next(((arguments, options) for kind, arguments, options in SAMPLERS.values() if kind == name), None)
    return found or ({}, {})


def table() -> str:
    """The rows, as Markdown."""
    head = "| scheduler | with | recorded | in a config |\n|---|---|---|---|\n"
    return head + "\n".join(row(name) for name in names()) + "\n"


def row(name: str) -> str:
    arguments, options = settings_of(name)
    shown = ", ".join(
        f"`{k}={v!r}`" for k, v in (arguments | options).items() if k not in {*LATENT, "clip_sample", "shift"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = recorded(name)
        place = in_config(name, arguments) if verdict == "exact" else "–"
    return f"| `{name}` | {shown or '–'} | {verdict} | {place} |"


def recorded(name: str) -> str:
    """'exact', 'refused: why' or 'not applicable: why'."""
    arguments, options = settings_of(name)
    try:
        scheduler = getattr(schedulers if name in schedulers.__all__ else diffusers, name)(**arguments)
        loop = Loop(scheduler, torch.float64)
        with TrajectoryRecorder(scheduler, dtype=torch.float64) as recorder:
            run(loop, options)
    except DeterministicStepError as error:
        return f"refused: no noise; {re.split('To make it stochastic, ', str(error))[1].rstrip('.')}"
    except ImportError:
        package = next(package for package, users in NEEDS.items() if name in users)
        return f"not applicable: needs the package {package}"
    except Exception as error:  # noqa: BLE001 - whatever a scheduler of another kind raises
        if name in NOT_OURS:
            return f"not applicable: {NOT_OURS[name]}"
        return f"refused: {reason(name, error)}"
    trajectory = recorder.trajectory
    assert torch.equal(
        replay(loop, trajectory, num_inference_steps=STEPS, dtype=torch.float64, **options), trajectory.log_prob
    )
    torch.testing.assert_close(trajectory.log_prob, densities(loop, options), rtol=1e-5, atol=2e-2)
    return "exact"


def reason(name: str, error: Exception) -> str:
    """The first clause of the recorder's own error, without what to do about it."""
    return re.split(r"\. Use|, so |: more", str(error).removeprefix(name).lstrip(". "))[0]


def in_config(name: str, arguments: dict[str, Any]) -> str:
    """Whether `prior.scheduler` takes it, on a config of its own kind of model."""
    flow = samples_flows(getattr(schedulers if name in schedulers.__all__ else diffusers, name)(**arguments))
    predicts = "flow_prediction" if flow else "epsilon"
    own = {k: v for k, v in arguments.items() if k not in LATENT}
    try:
        scheduler = build_scheduler({"shift": 3.0} if flow else LATENT, name, own, predicts=predicts)
        if why := check_sampler(scheduler, 20, 1.0):
            raise ValueError(why)
        check_single_step(scheduler)
    except ValueError as error:
        return "refused: another distribution than the model's" if "another distribution" in str(error) else "own loop"
    return "yes"


def run(loop: Loop, options: dict[str, Any]) -> Tensor:
    torch.manual_seed(7)
    return loop(STEPS, **options)


def densities(loop: Loop, options: dict[str, Any]) -> Tensor:
    """(batch, steps): log N(z; 0, 1) of the noise that was drawn, over the deviation: the slope of x_s between two draws."""
    found: list[Tensor] = []
    with observed(loop.scheduler, found):
        run(loop, options)
    return torch.stack(found, dim=1)


@contextlib.contextmanager
def observed(scheduler: Any, found: list[Tensor]) -> Iterator[None]:
    """Append the log-density of every step that is made."""
    step = scheduler.step

    def once(*args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        with Draws() as draws:
            output = step(*args, **kwargs)
        x_s = output[0].double()
        return output, next((z.double() for z in draws.seen if z.shape == x_s.shape), None)

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            other, z_other = once(*args, **kwargs)
        vars(scheduler).clear()
        vars(scheduler).update(before)
        output, z = once(*args, **kwargs)
        moved = output[0].double() - other[0].double()
        if z is None or z_other is None or float(moved.abs().max()) < 1e-4:
            found.append(torch.zeros(len(output[0]), dtype=torch.float64))
            return output
        std = (moved / (z - z_other)).abs().flatten().median()
        normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        found.append(normal.flatten(1).sum(1) - math.prod(DIMS) * std.log())
        return output

    watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def page_with(rows: str) -> str:
    """The page of the docs with these rows in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{rows}{END}{rest.split(END, 1)[1]}"
