"""How often the host waits for the device in one step, with and without the recorder; a command, not a test.

    python -m tests.measurements.waits

prints waits per step and per call of the bare pipeline, a rollout, a score and a gradient, for each kind of scheduler, and copies
to the device likewise, on the pretended device of `tests/oracles/pretended_device.py`: tiny random networks, so that only counts
mean something. They are counted at two numbers of steps, and the difference is per step. `lines=true` lists where they are.

    python -m tests.measurements.waits train configs/emoji_trust_pcl.yaml prior.device=pretended:0 train.iterations=1

runs a command of `diffusion-rtb` and lists its waits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

from diffusion_rtb.chain.noise import signs
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward
from diffusion_rtb.cli.main import main as command
from tests.oracles.pretended_device import DEVICE, Counts, counted
from tests.oracles.tiny import tiny_3_arguments, tiny_stable_diffusion, tiny_stable_diffusion_3

FEW, MANY = 2, 3
"""Denoising steps."""

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DDPM": (DDPMScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
}
FLOW = "FlowMatchEuler"
NAMES = [*SCHEDULERS, FLOW]

PASSES = ("bare", "rollout", "score", "gradient")


def pipeline(name: str) -> Any:
    """A tiny pipeline with this scheduler on the pretended device, its network trainable."""
    pipe = tiny_stable_diffusion_3() if name == FLOW else tiny_stable_diffusion()
    if name != FLOW:
        kind, arguments = SCHEDULERS[name]
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **arguments)
        pipe.text_encoder.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)


def call_of(pipe: Any, name: str, batch: int, steps: int) -> dict[str, Any]:
    """Arguments of its call; all that does not depend on the steps is on the device."""
    generators = [torch.Generator().manual_seed(row) for row in range(batch)]
    common = {"generator": generators, "output_type": "latent"}
    if name == FLOW:
        found = tiny_3_arguments(batch, steps) | common
    else:
        embeds = torch.randn(2, batch, 7, pipe.text_encoder.config.hidden_size)
        found = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "num_inference_steps": steps}
        found |= {"guidance_scale": 3.0, "eta": 1.0, **common}
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def counts(pipe: Any, name: str, batch: int, steps: int) -> Iterator[Counts]:
    """Of the passes, in their order."""
    call = call_of(pipe, name, batch, steps)
    with counted() as bare:
        pipe(**call)
    yield bare
    with counted() as rollout, TrajectoryRecorder(pipe.scheduler, dtype=torch.float64) as recorder:
        pipe(**call)
    yield rollout
    trajectory = recorder.trajectory
    ones = torch.ones(batch, steps, device=DEVICE)
    for again in (replay, lambda *given, **options: replay_backward(given[0], given[1], ones, **options)):
        with counted() as replayed:
            again(pipe, trajectory, call=call)
        yield replayed


@dataclass
class Row:
    """What one pass does."""

    few: Counts
    many: Counts

    def per_step(self, kind: str) -> int:
        """kind: "waits" or "sends"."""
        return (getattr(self.many, kind).total() - getattr(self.few, kind).total()) // (MANY - FEW)

    def besides(self, kind: str) -> int:
        """Of a call, apart from its steps."""
        return int(getattr(self.few, kind).total()) - FEW * self.per_step(kind)


def rows(pipe: Any, name: str, batch: int) -> dict[str, Row]:
    """Of each pass."""
    signs((batch, 4, 8, 8), 0, torch.float32, torch.device(DEVICE))  # sent once per process
    both = zip(counts(pipe, name, batch, FEW), counts(pipe, name, batch, MANY), strict=True)
    return {which: Row(*pair) for which, pair in zip(PASSES, both, strict=True)}


def of_command(arguments: Sequence[str]) -> None:
    """The waits of a command, line by line."""
    with counted() as found:
        try:
            command(arguments)
        finally:
            for kind in ("waits", "sends"):
                sys.stdout.write(f"\n{getattr(found, kind).total()} {kind}\n")
                for line, count in getattr(found, kind).most_common():
                    sys.stdout.write(f"{count:7}  {line}\n")


def main() -> None:
    if len(sys.argv) > 1 and "=" not in sys.argv[1]:
        of_command(sys.argv[1:])
        return
    write: Callable[[str], Any] = sys.stdout.write
    found = {name: rows(pipeline(name), name, 2) for name in NAMES}
    for kind in ("waits", "sends"):
        write(f"\n{kind} per step (and per call besides), batch 2\n")
        write(f"{'':18}" + "".join(f"{which:>16}" for which in PASSES) + "\n")
        for name, passes in found.items():
            cells = [f"{row.per_step(kind)} ({row.besides(kind):+d})" for row in passes.values()]
            write(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells) + "\n")
            if "lines=true" in sys.argv:
                for which, row in passes.items():
                    for line, count in getattr(row.many, kind).most_common():
                        write(f"    {which:10}{count:5}  {line}\n")


if __name__ == "__main__":
    main()
