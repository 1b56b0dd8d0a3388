"""metrics.jsonl is whole lines whatever happened before; missing trackers are named before anything runs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.text import Text

from diffusion_rtb.files.pictures import save_png
from diffusion_rtb.training.tracker import Tracker, check_trackers, tracker_arguments


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def tracking(tracker: Tracker, iteration: int = 0) -> Iterator[Tracker]:
    """As `Trainer.fit` tells it."""
    tracker.started(iteration)
    yield tracker
    tracker.ended()


def test_each_iteration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracking(Tracker(tmp_path, [], 3)) as tracker:
        for i in range(3):
            tracker.after(i, {"reward": i / 2, "elbo": -1.0, "seconds/rollout": 0.25})
    assert [row["iteration"] for row in logged(tmp_path)] == [0, 1, 2]
    assert logged(tmp_path)[1]["reward"] == 0.5
    plain = capsys.readouterr().err.splitlines()  # no terminal here: one plain line each
    assert len(plain) == 3
    assert "2/3" in plain[1]
    assert "reward 0.5" in plain[1]


def test_resuming_drops_repeated_and_half_written_lines(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], 9)
    for i in range(5):
        tracker.after(i, {"reward": float(i)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')  # killed while writing
    tracker.started(3)
    tracker.after(3, {"reward": 30.0})
    assert [row["reward"] for row in logged(tmp_path)] == [0, 1, 2, 30]


def test_resuming_at_zero_starts_over(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], 2)
    tracker.after(0, {"reward": 1.0})
    tracker.started(0)
    assert logged(tmp_path) == []


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracking(Tracker(tmp_path, [], 2, main=False)) as tracker:
        tracker.after(0, {"reward": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_missing_tracker_names_the_extra() -> None:
    missing = [name for name in ("wandb", "trackio", "tensorboard") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("every tracker is installed here")
    with pytest.raises(ValueError, match=rf"diffusion-rtb\[{missing[0]}\]"):
        check_trackers([missing[0]])


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    Tracker(tmp_path, [], 1).after(0, {"reward": float("nan"), "kl": float("inf"), "elbo": 1.0})
    assert logged(tmp_path) == [{"iteration": 0, "reward": None, "kl": None, "elbo": 1.0}]


def test_a_narrow_terminal_shows_bar_and_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], 3)
    screen = io.StringIO()
    tracker.console = Console(file=screen, force_terminal=True, width=60)
    with tracking(tracker):
        tracker.after(0, dict.fromkeys(("parity", "reward", "elbo", "kl", "ess", "residual_std", "log_z"), -1.2345))
    shown = Text.from_ansi(screen.getvalue().replace("\r", "\n")).plain
    assert "training" in shown
    assert "1/3" in shown
    assert "log Z -1.23" in shown


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    save_png(Image.new("RGB", (8, 8), "red"), tmp_path / "samples" / "0.png")
    with tracking(Tracker(tmp_path, ["tensorboard"], 2, config={"beta": 0.5, "train": {"lr": 0.1}})) as tracker:
        for i in range(2):
            tracker.after(i, {"reward": i / 2})
        tracker.image("samples", tmp_path / "samples" / "0.png", 1)
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*") if path.parent.name == "diffusion_rtb"}
    found = accumulators.EventAccumulator(str(events)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("reward")] == [(0, 0.0), (1, 0.5)]
    assert [e.step for e in found.Images("samples")] == [1]


def test_wandb_gets_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    track_two_iterations(tmp_path, "wandb")
    (summary,) = tmp_path.rglob("run-*.wandb")
    for _ in range(50):  # wandb's own process writes on after `finish`
        if b"reward" in summary.read_bytes():
            break
        time.sleep(0.1)
    assert b"reward" in summary.read_bytes()
    assert [path.suffix for path in tmp_path.rglob("media/images/*")] == [".png"]


def test_trackio_gets_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # Trackio settles its folder when it is imported: a process of its own keeps it out of the user's.
    script = (
        "import sys; from pathlib import Path; from tests.training.test_tracker import track_two_iterations; "
        "track_two_iterations(Path(sys.argv[1]), 'trackio')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        timeout=120,
    )
    with sqlite3.connect(tmp_path / "trackio" / "diffusion_rtb.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by step, id").fetchall()
    assert {name for name, _ in rows} == {tmp_path.name}
    logged_metrics = [json.loads(metrics) for _, metrics in rows]
    assert [row["reward"] for row in logged_metrics if "reward" in row] == [0.0, 0.5]
    assert [row["samples"]["_type"] for row in logged_metrics if "samples" in row] == ["trackio.image"]


def track_two_iterations(folder: Path, name: str) -> None:
    save_png(Image.new("RGB", (64, 64), "red"), folder / "samples" / "0.png")
    with tracking(Tracker(folder, [name], 2, config={"beta": 0.5, "train": {"lr": 0.1}})) as tracker:
        for i in range(2):
            tracker.after(i, {"reward": i / 2})
        tracker.image("samples", folder / "samples" / "0.png", 1)


def test_tensorboard_of_a_resumed_run_shows_each_iteration_once(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, [0.0, 0.1, 0.2, 9.0]), (3, [0.3, 0.4])):  # killed after iteration 3, checkpoint of 3
        with tracking(Tracker(tmp_path, ["tensorboard"], 9, start=start), start) as tracker:
            for i, value in enumerate(values, start):
                tracker.after(i, {"reward": value})
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*") if path.parent.name == "diffusion_rtb"}
    found = accumulators.EventAccumulator(str(events)).Reload()
    assert [e.step for e in found.Scalars("reward")] == [0, 1, 2, 3, 4]
    assert [round(e.value, 6) for e in found.Scalars("reward")] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_wandb_continues_its_run_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    track_two_iterations(tmp_path / "run", "wandb")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    track_two_iterations(tmp_path / "moved", "wandb")
    assert list((tmp_path / "cwd").iterdir()) == []
    ids = {path.stem.removeprefix("run-") for path in (tmp_path / "moved").rglob("run-*.wandb")}
    assert ids == {json.loads((tmp_path / "moved" / "trackers.json").read_text())["wandb"]}


def test_trackers_are_asked_for_the_run_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "first").mkdir()
    before = tracker_arguments(tmp_path / "first", ["wandb", "trackio", "tensorboard"], 0)
    assert before["trackio"] == {"name": "first", "resume": "never"}  # another folder's run may have that name
    assert "tensorboard" not in before
    (tmp_path / "first").rename(tmp_path / "second")
    after = tracker_arguments(tmp_path / "second", ["wandb", "trackio", "tensorboard"], 7)
    assert after["wandb"]["id"] == before["wandb"]["id"]
    assert after["wandb"]["dir"] == str(tmp_path / "second")
    assert after["trackio"] == {"name": "first", "resume": "allow"}
    assert after["tensorboard"] == {"purge_step": 7}
