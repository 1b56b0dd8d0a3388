"""Where the numbers of a run go: always `metrics.jsonl`, the terminal, and the trackers that were asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from diffusion_rtb.config.section import leaves
from diffusion_rtb.estimates import VAGUE
from diffusion_rtb.files.terminal import console
from diffusion_rtb.files.whole import write_json
from diffusion_rtb.run.metrics_file import METRICS, append_row, cut_rows
from diffusion_rtb.training.observers import Observer

__all__ = ["Tracker", "TrackerError", "check_trackers", "tracker_arguments"]

KNOWN = "trackers.json"
"""Which run of a tracker a run of ours is: a resumed one goes on there, also after its folder was moved or renamed."""

log = logging.getLogger(__name__)

SHOWN = {
    "parity": "parity",
    "achieved_strength": "strength",
    "reward": "reward",
    "elbo": "elbo",
    "kl": "kl",
    "ess": "ess",
    "residual_std": "residual",
    "log_z": "log Z",
    "rounding_floor": "rounding floor",
}
"""What the terminal shows of an iteration, in this order."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is loaded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"train.tracker asks for {name!r}, which is not installed: pip install 'diffusion-rtb[{name}]', or take it out. "
                "metrics.jsonl is written in any case."
            )


class TrackerError(RuntimeError):
    """A tracker that was asked for cannot be used; the message says what it said and what to do."""


class Tracker(Observer):
    """Write metrics line by line and show progress: a bar on a terminal, plain lines elsewhere.

    Args:
        folder: The run's folder.
        names: Trackers besides metrics.jsonl: "tensorboard", "wandb", "trackio".
        total: Iterations of the run.
        config: What the trackers store as the run's settings.
        start: The iteration that comes next.
        main: Only the main process writes and shows anything.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        total: int,
        *,
        config: Mapping[str, Any] | None = None,
        start: int = 0,
        main: bool = True,
    ) -> None:
        self.path = folder / METRICS
        self.total = total
        self.main = main
        self.console = console(stderr=True)
        self.progress: Progress | None = None
        self._flat = False
        self.accelerator = _accelerated(folder, names, config or {}, start) if names and main else None

    def started(self, iteration: int) -> None:
        """Forget what was logged at or after `iteration`: those iterations are going to be repeated. Then show the bar."""
        if not self.main:
            return
        cut_rows(self.path, iteration)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = _Bar(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task("training", total=self.total, completed=iteration, numbers="")

    def waiting(self, announcement: str) -> None:
        """Say so."""
        if self.main:
            self.console.print(announcement, style="dim")

    def ended(self) -> None:
        """Close the bar and the trackers."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        if self.accelerator is not None:
            self.accelerator.end_training()

    def after(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append one line of JSON, and show the most telling numbers."""
        if not self.main:
            return
        append_row(self.path, iteration, metrics)
        self._tell_if_flat(iteration, metrics)
        if self.accelerator is not None:
            self.accelerator.log(dict(metrics), step=iteration)
        shown = {name: _short(metrics[name]) for name in SHOWN if name in metrics}
        if metrics.get("strength_error", 0.0) > VAGUE:
            shown["achieved_strength"] += f" ± {_short(metrics['strength_error'])}, untold"
        text = "  ".join(f"{label} {shown[name]}" for name, label in SHOWN.items() if name in shown)
        if self.progress is not None:
            self.progress.update(self.task, completed=iteration + 1, numbers=text)
        else:
            seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
            sys.stderr.write(f"{iteration + 1:>5}/{self.total}  {text}  {seconds:.1f} s\n")
            sys.stderr.flush()

    def extra(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append a line that is of no iteration done."""
        append_row(self.path, iteration, metrics)
        if self.accelerator is not None:
            self.accelerator.log(dict(metrics), step=iteration)

    def _tell_if_flat(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Say once that a reward does not tell samples apart: everything else goes on looking healthy."""
        if metrics.get("reward_std") == 0 and not self._flat:
            self._flat = True
            self.console.print(
                f"Every reward of iteration {iteration} is {metrics['reward']:g}: it tells no sample from another, and nothing "
                "can be learned from it. `diffusion-rtb check-reward CONFIG` looks for the reason.",
                style="yellow",
            )

    def image(self, name: str, path: Path, iteration: int) -> None:
        """Hand a picture that is on the disk to the trackers that take pictures."""
        if self.accelerator is None:
            return
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                import trackio

                # accelerate hands it numbers only.
                tracker.log({name: trackio.Image(str(path))}, step=iteration)
            elif hasattr(tracker, "log_images"):
                # tensorboard takes channels first unless told; the others know no such argument.
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=iteration, **layout)


class _Bar(Progress):
    """A bar with the numbers on the line below: beside it they would leave a narrow terminal without the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["numbers"])


def _accelerated(folder: Path, names: Sequence[str], config: Mapping[str, Any], start: int) -> Accelerator:
    arguments = tracker_arguments(folder, names, start)
    flat = {key: value for key, value in leaves(config) if isinstance(value, int | float | str | bool)}
    accelerator = Accelerator(log_with=list(names), project_dir=folder)
    try:
        accelerator.init_trackers("diffusion_rtb", config=flat, init_kwargs=arguments)
    except Exception as error:  # each tracker has kinds of its own
        login = "`wandb login`, or WANDB_MODE=offline in the environment, or " if "wandb" in names else ""
        said = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise TrackerError(
            f"train.tracker {', '.join(names)} could not be started: {said}. Nothing was loaded yet. Remedies: {login}take it out, "
            "metrics.jsonl is written in any case."
        ) from error
    return accelerator


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def tracker_arguments(folder: Path, names: Sequence[str], start: int) -> dict[str, dict[str, Any]]:
    """What each tracker is started with, so that it continues its run of this folder and writes into this folder.

    The names it knows the run by are kept in FOLDER/trackers.json. `start` comes next: what tensorboard holds of later iterations
    is not shown.
    """
    known = _known(folder / KNOWN)
    arguments: dict[str, dict[str, Any]] = {}
    for name in names:
        again = name in known
        if name == "wandb":
            known.setdefault(name, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
            arguments[name] = {"name": folder.name, "id": known[name], "resume": "allow", "dir": str(folder)}
        elif name == "trackio":
            # Trackio knows runs by name: one of this name that is not in the file is another folder's.
            known.setdefault(name, folder.name)
            arguments[name] = {"name": known[name], "resume": "allow" if again else "never"}
        elif name == "tensorboard" and start > 0:
            arguments[name] = {"purge_step": start}
    if known:
        write_json(folder / KNOWN, known)
    return arguments


def _known(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {str(name): str(run) for name, run in found.items()}
    except (ValueError, AttributeError) as error:
        log.warning("%s is damaged (%s): the trackers begin new runs.", path, error)
        return {}
