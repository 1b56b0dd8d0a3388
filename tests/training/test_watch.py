"""Runs that are watched: the numbers in their rows, the alarm, the stop, the best checkpoint, and that nothing else changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.load import config_text
from diffusion_rtb.run.best import read_best
from diffusion_rtb.run.checkpoint import load_checkpoint
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.watch.look import plan
from tests.oracles.behaving import BETA, QUADRATIC, begin_at_the_posterior, differing, rows, run, state

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

WATCHING = "tests.oracles.watching"
WATCH: dict[str, Any] = {
    "every": 2,
    "judges": [
        {"component": f"{WATCHING}:first", "name": "first"},
        {"component": f"{WATCHING}:second", "name": "down"},
    ],
    "embedder": f"{WATCHING}:raised",
    "samples": 16,
    "policy": "elbo",
}


def made(
    out: Path, *, train: dict[str, Any] | None = None, watch: dict[str, Any] | None = WATCH, **more: Any
) -> Trainer:
    sizes = {"iterations": 5, "checkpoint_every": 3, "keep_checkpoints": 1}
    return run(out, reward=QUADRATIC, watch=watch, train=sizes | (train or {}), **more)


def without_watch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("watch/")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = made(tmp_path_factory.mktemp("whole"))
    trainer.fit()
    return trainer


def test_a_look_changes_no_number_of_the_run(whole: Trainer, tmp_path: Path) -> None:
    alone = made(tmp_path, watch=None)
    alone.fit()
    assert without_watch(rows(whole)[:-1]) == rows(alone)
    assert differing(state(whole), state(alone)) == []
    assert not (alone.folder / "watch").exists()


def test_the_rows_have_the_looks(whole: Trainer) -> None:
    found = {row["iteration"]: row for row in rows(whole) if "watch/reward" in row}
    assert list(found) == [0, 2, 4, 5], "the prior, every second, and the finished posterior in a row of its own"
    assert "reward" not in found[5]
    assert all(row["watch/samples"] == WATCH["samples"] for row in found.values())
    keys = ["reward", "kl", "elbo", "norm_ratio", "vendi", "distance", "judge/first", "judge/down", "alarm"]
    assert all(set(row) >= {f"watch/{key}" for key in keys} for row in found.values())
    prior, last = found[0], found[5]
    assert prior["watch/kl"] == 0
    assert prior["watch/norm_ratio"] == 1
    assert prior["watch/elbo"] == pytest.approx(BETA * prior["watch/reward"])
    assert last["watch/kl"] != 0
    assert last["watch/elbo"] == pytest.approx(BETA * last["watch/reward"] - last["watch/kl"])
    assert whole.config.watch is not None
    prompts, seeds = plan(whole.config, whole.config.watch)
    batch = whole.sampler.draw(prompts, seeds, images=True)
    assert batch.images is not None
    assert last["watch/reward"] == pytest.approx(float(batch.reward.double().mean()))
    assert last["watch/judge/first"] == pytest.approx(float(batch.images[:, 0].double().mean()))
    assert last["watch/judge/down"] == pytest.approx(-float(batch.images[:, 1].double().mean()))
    before = whole.sampler.draw(prompts, seeds, of_prior=True)
    assert prior["watch/reward"] == pytest.approx(float(before.reward.double().mean()))


def test_the_best_checkpoint_is_kept_and_opens(whole: Trainer) -> None:
    looks = {row["iteration"]: row["watch/elbo"] for row in rows(whole) if row.get("watch/alarm") == 0}
    looks.pop(0)
    expected = max(looks, key=lambda i: (looks[i], -i))
    best = read_best(whole.folder / "checkpoints")
    assert best is not None
    assert best.iteration == expected
    names = sorted(path.name for path in (whole.folder / "checkpoints").glob("0*"))
    assert names == sorted({best.name, "00000005"})
    assert open_trained_run(whole.folder, checkpoint="best").progress.done == expected


def hacked(out: Path, **watch: Any) -> Trainer:
    """A reward of the first number alone, trained far too fast, under a judge that wants it low."""
    bands = {"reward": 0.3, "judge": 0.3}
    judges = [{"component": "density", "name": "low", "density": {"linear": [-1.0, 0.0]}}]
    section = WATCH | {"every": 1, "judges": judges, "samples": 16, "bands": bands} | watch
    return run(
        out,
        reward={"linear": [1.0, 0.0]},
        watch=section,
        beta=4.0,
        train={"iterations": 6, "lr": 0.3, "checkpoint_every": 2},
    )


def test_the_alarm_is_told_shown_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = hacked(tmp_path, stop=True, policy="reward")
    trainer.fit()
    assert trainer.interrupted
    looks = {row["iteration"]: row["watch/alarm"] for row in rows(trainer)}
    at = max(looks)
    assert [looks[i] for i in range(at + 1)] == [0] * at + [1]
    assert trainer.iteration == at + 1, "the iteration was finished, and is in a checkpoint"
    assert load_checkpoint(trainer.folder / "checkpoints" / f"{at + 1:08d}")
    text = caplog.text
    assert f"looks hacked at iteration {at}, now: it rose by" in text
    assert "the judge low fell by" in text
    assert "What helps: a smaller beta" in text
    assert Image.open(trainer.folder / "watch" / f"{at:06d}.png").width > 200
    best = read_best(trainer.folder / "checkpoints")
    assert best is None or best.iteration < at
    caplog.clear()
    hacked(tmp_path, stop=True, policy="reward").fit()
    assert f"looks hacked at iteration {at + 1}, since iteration {at}" in caplog.text
    caplog.clear()
    on = hacked(tmp_path, stop=False, policy="reward")
    on.fit()
    assert not on.interrupted
    assert f"looks hacked at iteration 6, since iteration {at}" in caplog.text
    straight = hacked(tmp_path / "straight", stop=False, policy="reward")
    straight.fit()
    assert rows(straight) == rows(on)
    assert differing(state(straight), state(on)) == []


def test_a_sound_run_that_rises_far_raises_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the exact posterior of a linear reward, what is uncorrelated with the reward stays as it was, however far that rises."""
    judges = [{"component": "density", "name": "across", "density": {"linear": [0.3, -1.0]}}]
    section = WATCH | {"every": 1, "judges": judges, "embedder": f"{WATCHING}:across"}
    trainer = run(tmp_path, reward={"linear": [1.0, 0.0]}, watch=section, beta=8.0, train={"iterations": 1, "lr": 1e-6})
    begin_at_the_posterior(trainer)
    trainer.fit()
    before, after = rows(trainer)
    assert after["watch/reward"] > before["watch/reward"] + 3 * 2.0**0.5, "three standard deviations of the prior"
    assert after["watch/judge/across"] == pytest.approx(before["watch/judge/across"], abs=0.1)
    assert [row["watch/alarm"] for row in (before, after)] == [0.0, 0.0]
    assert "hacked" not in caplog.text


def test_the_command_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = hacked(tmp_path, stop=True)
    (tmp_path / "hacked.yaml").write_text(config_text(trainer.config))
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "hacked.yaml"), f"out={tmp_path / 'other'}"])
    said = capsys.readouterr().err
    assert left.value.code == 130
    assert "of 6 iterations by the alarm of iteration" in said
    assert "with watch.stop=false to the end." in said


def fail() -> None:
    raise ValueError("no answer")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("look", "act"), [(1, stop), (2, fail), (3, stop)])
def test_wherever_a_look_ends_the_run_goes_on_as_if_it_had_not(
    whole: Trainer, act: Callable[[], None], look: int, tmp_path: Path
) -> None:
    """Each look draws two micro-batches; the call is in the middle of a draw, of the prior in the first look."""
    first = made(tmp_path)
    judge = first.observers[0]._tools.judges["down"]  # type: ignore[attr-defined]
    calls = [0]

    def called(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2 * look - 1:
            act()
        values: torch.Tensor = judge(images, prompts)
        return values

    first.observers[0]._tools.judges["down"] = called  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"down of watch\.judges.* no answer") if act is fail else nullcontext():
        first.fit()
    assert first.iteration == 2 * (look - 1)
    again = made(tmp_path)
    again.fit()
    assert rows(again) == rows(whole)
    assert differing(state(again), state(whole)) == []
    assert read_best(again.folder / "checkpoints") == read_best(whole.folder / "checkpoints")


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"judges": ["nothing"]}, r"watch.judges: nothing: There is no reward named 'nothing'"),
        (
            {"judges": [{"component": "density", "density": {"linear": [1.0]}, "scale": 2}]},
            "watch.judges: density: .*'scale'",
        ),
        ({"judges": [], "policy": "judge"}, "policy judge needs a judge"),
        ({"embedder": None, "policy": "frontier"}, "policy frontier needs a diversity"),
        (
            {"judges": [f"{WATCHING}:first", f"{WATCHING}:first"]},
            "two judges are called 'tests.oracles.watching:first': add `name",
        ),
        ({"embedder": "jpeg"}, "watch.embedder: There is no embedder named 'jpeg'"),
        ({"prompts": 2}, "watch.prompts is 2, and the run has 1 prompts"),
        ({"samples": 2}, "watch.samples|greater than or equal to 3"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(watch: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, watch=WATCH | watch)
    assert not (tmp_path / "known").exists()


def test_a_missing_package_is_named_with_its_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        ValueError, match=r"watch.judges: ocr: .*not installed: pip install 'diffusion-rtb\[ocr\]'.*take it out"
    ):
        made(tmp_path, watch=WATCH | {"judges": ["ocr"]})


def test_a_judge_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"watching:broken of watch.judges.*ConnectionError: nobody answers"):
        made(tmp_path, watch=WATCH | {"judges": [f"{WATCHING}:broken"]}).fit()


def test_what_could_not_help_is_warned_of(tmp_path: Path) -> None:
    same = {"component": "density", "density": QUADRATIC, "name": "again"}
    with pytest.warns(UserWarning, match="again is the reward that is trained"):
        made(tmp_path / "a", watch=WATCH | {"judges": [same]})
    with pytest.warns(UserWarning, match=r"watch.every is 9, and the run has 5 iterations"):
        made(tmp_path / "b", watch=WATCH | {"every": 9})


def test_watching_begins_and_ends_whenever_one_likes(whole: Trainer, tmp_path: Path) -> None:
    made(tmp_path, watch=None, train={"iterations": 3}).fit()
    later = made(tmp_path)
    later.fit()
    found = [row["iteration"] for row in rows(later) if "watch/reward" in row]
    assert found == [4, 5]
    assert rows(later)[-2:] == rows(whole)[-2:]
