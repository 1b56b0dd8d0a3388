"""What full fine-tuning takes beside a LoRA, on the bundled prior: the table of docs/memory.md.

python -m tests.measurements.full_table [ITERATIONS]

Both in turns, twice each, in processes of their own: prior, reward and sizes of configs/emoji_trust_pcl.yaml with RTB. Seconds are
those of whole iterations, with the copy that a failed one goes back to, and without the first; memory is the most that the process
had resident, its libraries and the checkpoint that it wrote in the end included.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter, process_time
from typing import Any

from diffusion_rtb.config.load import load_config
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.observers import Observer

KINDS = {
    "LoRA, rank 8, attention": "{rank: 8, alpha: 8.0}",
    "full, the same modules": "{full: true, target_modules: [to_q, to_k, to_v, to_out.0]}",
    "full": "{full: true}",
}
TURNS = 2


class Times(Observer):
    """When iterations ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        self.ends.append((perf_counter(), process_time()))

    @property
    def each(self) -> tuple[float, float]:
        """Seconds of an iteration, by the clock and of the processor; the median."""
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        wall, cpu = (statistics.median(b[k] - a[k] for a, b in pairs) for k in (0, 1))
        return wall, cpu


def measured(posterior: str, iterations: str) -> dict[str, float]:
    """One short run of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"out={folder}", "objective={component: rtb}", "behaviours=[]", "train.grid_every=0", "train.lr=1e-5"]
        sizes = [f"train.iterations={iterations}", "train.gradient_steps=null", "train.checkpoint_every=1000"]
        config = load_config("configs/emoji_trust_pcl.yaml", [f"posterior={posterior}", *own, *sizes])
        trainer, times = assemble(config), Times()
        trainer.observers.append(times)
        trainer.fit()
        (checkpoint,) = (trainer.folder / "checkpoints").glob("0*")
        written = sum(file.stat().st_size for file in checkpoint.iterdir())
        trained = sum(parameter.numel() for parameter in trainer.prior.parameters().values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    wall, cpu = times.each
    return {"trained": trained, "peak": peak, "wall": wall, "cpu": cpu, "checkpoint": written / 1e6}


def main() -> None:
    """Print the table, with the ratios to the first row."""
    iterations = sys.argv[1] if len(sys.argv) > 1 else "6"
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, posterior in KINDS.items():
            child = [sys.executable, "-m", "tests.measurements.full_table", "--child", posterior, iterations]
            out = subprocess.run(child, check=True, capture_output=True, text=True).stdout
            found[kind].append(json.loads(out.splitlines()[-1]))
    least = {kind: {key: min(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()}
    base = next(iter(least.values()))
    head = ("posterior", "trained numbers", "peak, MiB", "seconds", "CPU seconds", "ratio", "checkpoint, MB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind, row in least.items():
        cells = [f"{row['trained']:,}", f"{row['peak']:.0f}", f"{row['wall']:.2f}", f"{row['cpu']:.2f}"]
        cells += [f"{row['cpu'] / base['cpu']:.2f}", f"{row['checkpoint']:.1f}"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(measured(*sys.argv[2:4])) + "\n")
    else:
        main()
