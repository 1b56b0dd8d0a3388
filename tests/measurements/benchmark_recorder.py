"""Benchmarks of the recorder on the bundled pipeline; a command, not a test.

    python -m tests.measurements.benchmark_recorder

prints the overhead of recording (share of the CPU seconds of sampling, which other jobs blur less than wall time; median over
interleaved pairs) and the peak of live activations while the exact gradient of a whole trajectory is taken, at 5 and at 50
steps, beside that of plain autograd through the chain. Activations are counted, not timed: every tensor that autograd saves,
until freed.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import nullcontext
from time import process_time
from typing import Any

import torch

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.doctor.sizes import GraphBytes


def bundled() -> Any:
    """The emoji pipeline as stock diffusers loads it."""
    from diffusers import StableDiffusionPipeline

    from pipelines.emoji import path

    pipe = StableDiffusionPipeline.from_pretrained(path(), safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.requires_grad_(False)
    return pipe


def call(batch: int, steps: int) -> dict[str, Any]:
    return {"prompt": ["a cat emoji"] * batch, "num_inference_steps": steps, "eta": 1.0, "guidance_scale": 1.0}


def seconds_of_sampling(pipe: Any, batch: int, steps: int, *, recorded: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    start = process_time()
    with TrajectoryRecorder(pipe.scheduler) if recorded else nullcontext():
        pipe(**call(batch, steps), generator=generator, output_type="pt")
    return process_time() - start


def overhead(pipe: Any, batch: int, steps: int = 20, pairs: int = 12) -> float:
    """Median of (recorded - plain)/plain over interleaved pairs."""
    for recorded in (False, True):
        seconds_of_sampling(pipe, batch, steps, recorded=recorded)
    ratios = []
    for _ in range(pairs):
        plain = seconds_of_sampling(pipe, batch, steps, recorded=False)
        ratios.append(seconds_of_sampling(pipe, batch, steps, recorded=True) / plain - 1)
    return statistics.median(ratios)


def recorded_trajectory(pipe: Any, batch: int, steps: int) -> Trajectory:
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        pipe(**call(batch, steps), generator=torch.Generator().manual_seed(0), output_type="latent")
    return recorder.trajectory


def activations(pipe: Any, steps: int, batch: int = 2) -> tuple[int, int]:
    """Peak bytes of live activations: backward inside the step, and autograd through the whole chain."""
    trajectory = recorded_trajectory(pipe, batch, steps)
    ones = torch.ones(batch, steps)
    ours = GraphBytes([trajectory.x]).during(lambda: replay_backward(pipe, trajectory, ones, **call(batch, steps)))
    plain = GraphBytes([trajectory.x]).during(
        lambda: replay(pipe, trajectory, grad=True, **call(batch, steps)).sum().backward()
    )
    return ours, plain


def main() -> None:
    pipe = bundled()
    write = sys.stdout.write
    for batch in (1, 16, 32):
        write(f"recording overhead, batch {batch:2d}, 20 steps: {overhead(pipe, batch):+.2%} of CPU seconds\n")
    few, few_plain = activations(pipe, 5)
    many, many_plain = activations(pipe, 50)
    write(f"peak activations, backward inside the step: 5 steps {few / 2**20:.2f} MiB, 50 steps {many / 2**20:.2f} MiB")
    write(f" (ratio {many / few:.3f})\n")
    write(f"peak activations, autograd through the chain: 5 steps {few_plain / 2**20:.2f} MiB, 50 steps ")
    write(f"{many_plain / 2**20:.2f} MiB (ratio {many_plain / few_plain:.2f})\n")


if __name__ == "__main__":
    main()
