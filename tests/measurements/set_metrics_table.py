"""What the metrics of whole sets of samples cost: CPU time and memory on random vectors, each in a process of its own.

python -m tests.measurements.set_metrics_table --samples 2000 --dim 512
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.samples import Drawn

METRICS = ("diversity", "prdc", "mmd", "kid", "frechet")


def cost(name: str, samples: int, dim: int, prompts: int) -> str:
    """A line of the table."""
    prompt = torch.arange(prompts).repeat_interleave(samples // prompts)
    sides = [Drawn(prompt, torch.randn(len(prompt)), embedding=torch.randn(len(prompt), dim)) for _ in range(2)]
    metric = describe({"component": name}, "metric").construct()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    metric.of(*sides, 1.0, EvalConfig())
    used = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return f"{name:10} {used:6.1f} s {grown:7.0f} MiB\n"


def main() -> None:
    """All metrics, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--metric", choices=METRICS)
    given = parser.parse_args()
    if given.metric is not None:
        torch.manual_seed(0)
        sys.stdout.write(cost(given.metric, given.samples, given.dim, given.prompts))
        return
    for name in METRICS:
        subprocess.run(
            [sys.executable, "-m", "tests.measurements.set_metrics_table", *sys.argv[1:], "--metric", name], check=True
        )


if __name__ == "__main__":
    main()
