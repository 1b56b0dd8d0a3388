"""The folder of a run: made once, continued by the same config wherever it lies, refused to another one and to a second command.

runs/NAME/
    config.yaml     the resolved config; each checkpoint holds it as well
    prompts.jsonl   its prompts and their metadata, where they were given as a file
    manifest.json   one entry per start: versions, git state, hardware, hash of the prompts
    .lock           held by the command that writes here, see `files/lock.py`
    metrics.jsonl, checkpoints/, samples/, watch/, eval/, lora/ or (of full fine-tuning) posterior/
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion_rtb.config.changes import MAY_CHANGE, changes
from diffusion_rtb.config.load import CONFIG, PROMPTS, ConfigError, RunConfig, config_text, load_config
from diffusion_rtb.config.moved import renamed
from diffusion_rtb.config.yaml_text import write_yaml
from diffusion_rtb.files.lock import LOCK, folder_lock
from diffusion_rtb.files.whole import clear_unfinished, write_text
from diffusion_rtb.run.checkpoint import clear_leftovers
from diffusion_rtb.run.checkpoint_reading import Checkpoint, candidates, latest_state, read_latest
from diffusion_rtb.run.manifest import MANIFEST, manifest_text
from diffusion_rtb.run.metrics_file import METRICS, read_rows

__all__ = [
    "RunFolderError",
    "check_place",
    "check_same",
    "check_trained_config",
    "find_run",
    "hold_run",
    "is_run",
    "name_free_again",
    "open_run",
    "run_folder",
]

CHECKPOINTS = "checkpoints"

UNTRAINED = {CONFIG, PROMPTS, MANIFEST, LOCK, METRICS, CHECKPOINTS, "trackers.json", "wandb", "diffusion_rtb"}
"""What the folder of a run holds before its first iteration; the last two are trackers' folders."""

log = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """The run's folder belongs to something else; the message says to what and what to do."""


def run_folder(config: RunConfig) -> Path:
    """Where a new run's files go: out/name."""
    return Path(config.out, config.name)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, by what only runs have: a config alone may be anybody's."""
    return any((folder / name).exists() for name in (MANIFEST, METRICS, CHECKPOINTS)) and not folder.is_file()


def find_run(path: Path | str, overrides: Sequence[str] = (), *, restore: bool = True) -> tuple[RunConfig, Path]:
    """The config that CONFIG means, and the folder of its run.

    A run's folder, or the config.yaml in it, means that run, where it lies now, whatever it is called; with an override of `out`
    or `name`, or a config file, the run is in out/name.

    Args:
        path: CONFIG.
        overrides: See `load_config`.
        restore: Write a lost config.yaml anew from the latest checkpoint; otherwise nothing is written.

    Raises:
        ConfigError: see `load_config`; of a damaged config.yaml the message says what restores it.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.name == CONFIG and not path.is_dir() else path
    if not is_run(folder):
        config = load_config(path, overrides)
        return config, run_folder(config)
    config = _held_config(folder, overrides) if restore else load_config(folder, overrides)
    elsewhere = {override.partition("=")[0].strip() for override in overrides} & {"out", "name"}
    return config, run_folder(config) if elsewhere else folder


def open_run(
    config: RunConfig, folder: Path | None = None, start: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """Make the run's folder, or reopen it for the same config, and note in its manifest what it runs on, and started from.

    Returns:
        Where the run goes on from, if it has done anything yet.

    Raises:
        RunFolderError: the folder holds another config, or files that are not a run; its checkpoints are gone or damaged.
    """
    folder = run_folder(config) if folder is None else folder
    check_place(folder)
    found = read_latest(folder / CHECKPOINTS)
    _check_config(config, folder, None if found is None else (found.path, found.state))
    if found is None:
        _check_progress(config, folder)
    files = _config_files(config) | {MANIFEST: manifest_text(config, folder, start)}
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder / CHECKPOINTS)
    for place in (folder, folder / "samples", folder / "watch", folder / "eval"):
        clear_unfinished(place)
    for name, text in files.items():
        write_text(folder / name, text)
    return found


def _config_files(config: RunConfig) -> dict[str, str]:
    """What is written of a config; prompts of a file go to a file beside it."""
    if config.prompts.file is None:
        return {CONFIG: config_text(config)}
    own = config.prompts.model_copy(update={"file": PROMPTS})
    return {PROMPTS: config.prompts.table().lines, CONFIG: config_text(config.model_copy(update={"prompts": own}))}


@contextmanager
def hold_run(folder: Path, use: bool = True) -> Iterator[None]:
    """Be the only command that writes into the run's folder, which is made if it is not there; see `folder_lock`.

    Raises:
        RunFolderError: the folder holds files that are not a run.
    """
    if use:
        check_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, use):
        yield


@contextmanager
def name_free_again(config: RunConfig, folder: Path | None = None, use: bool = True) -> Iterator[None]:
    """Take the run's folder away again where an error ends the block before anything was trained in it.

    A config with a mistake that shows only once the prior is there, or in the first iteration, could else not be corrected under
    its name.
    """
    folder = run_folder(config) if folder is None else folder
    made = not folder.exists()
    new = made or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    except BaseException:
        if use and new and folder.is_dir() and _untrained(folder):
            _empty(folder)
            if made:
                with suppress(OSError):
                    folder.rmdir()
        raise


def check_trained_config(
    config: RunConfig, state: Mapping[str, Any], checkpoint: Path, remedy: str, *, what: str
) -> None:
    """Refuse a config that differs from the one in a checkpoint's state in more than MAY_CHANGE; all that differs is listed.

    `what` is the beginning of the RunFolderError, `remedy` the sentence on what to do instead.
    """
    try:
        trained = RunConfig.model_validate(renamed(state["config"]))
    except ValidationError as error:
        raise RunFolderError(
            f"{checkpoint} holds a config that this version cannot read ({error.error_count()} problems): it is of another version."
        ) from None
    # A prior that was moved is known by its weights, which its fingerprint names.
    moved = ("prior.path",) if "weights" in state["prior"] else ()
    lines = changes(trained, config, also=moved)
    if lines:
        allowed = f"Free to change: {', '.join(MAY_CHANGE)}."
        raise RunFolderError("\n".join([what, *lines, remedy, allowed]))
    done = int(state["iteration"])
    if config.train.iterations < done:
        raise RunFolderError(
            f"train.iterations is {config.train.iterations}, and {checkpoint} has done {done}: iterations cannot be taken back. "
            f"Ask for {done} or more, or choose another name (name=...)."
        )


ANOTHER = "Choose another name (name=...)"
"""The beginning of a sentence on what to do."""


def check_same(config: RunConfig, folder: Path, remedy: str = ANOTHER) -> None:
    """Refuse a folder that is no run's, or that of another config; `remedy` is the beginning of a sentence on what to do."""
    check_place(folder, remedy)
    _check_config(config, folder, latest_state(folder / CHECKPOINTS), remedy)


def check_place(folder: Path, remedy: str = ANOTHER) -> None:
    """Refuse a folder that holds something else than a run."""
    if _holds_something(folder) and not is_run(folder) and not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"{folder} exists and is not a run's folder: it has no {CONFIG}. {remedy}, or delete {folder} to start afresh."
        )


def _holds_something(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()))


def _check_config(
    config: RunConfig, folder: Path, found: tuple[Path, Mapping[str, Any]] | None, remedy: str = ANOTHER
) -> None:
    """Refuse another config than that of the checkpoint that was found, or else of the folder."""
    remedy = f"{remedy}, or delete {folder} to start afresh."
    if found is not None:
        path, state = found
        check_trained_config(config, state, path, remedy, what=f"{folder} already holds a run with another config.")
        return
    if not _holds_something(folder):
        return
    try:
        held = load_config(folder)
    except ConfigError as error:
        raise RunFolderError(f"{folder} holds a config this version cannot read: {error}\n{remedy}") from None
    lines = changes(held, config)
    if lines:
        raise RunFolderError("\n".join([f"{folder} already holds a run with another config.", *lines, remedy]))


def _check_progress(config: RunConfig, folder: Path) -> None:
    """Refuse to train again, in silence and over the old numbers, what checkpoints had held that are gone or damaged."""
    rows, _ = read_rows(folder / METRICS)
    done = max(rows, default=-1) + 1
    damaged = [path.name for path in candidates(folder / CHECKPOINTS, replaced=True)]
    if damaged:
        raise RunFolderError(
            f"All checkpoints in {folder / CHECKPOINTS} are damaged, the newest is {damaged[0]}. Put a sound one back to go on; to "
            f"train again from the start, delete {folder / METRICS} and {folder / CHECKPOINTS}."
        )
    if done > config.train.checkpoint_every:
        raise RunFolderError(
            f"{folder / METRICS} knows {done} iterations, and {folder / CHECKPOINTS} holds no sound checkpoint. Put one back to "
            f"go on; to train them again from the start, delete {folder / METRICS}."
        )


def _held_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The config in a run's folder; a lost or empty file is written anew from the latest checkpoint."""
    file = folder / CONFIG
    if not file.exists() or (file.is_file() and not file.read_bytes().strip(b"\0 \t\r\n")):
        _restore_config(file, latest_state(folder / CHECKPOINTS))
    try:
        return load_config(folder, overrides)
    except ConfigError as error:
        found = None if _readable(folder) else latest_state(folder / CHECKPOINTS)
        if found is None:
            raise  # the overrides are what is wrong, or nothing knows better
        raise ConfigError(
            f"{error}\n{found[0]} holds the config that the run was trained with: delete {file}, and the next command restores it."
        ) from None


def _readable(folder: Path) -> bool:
    try:
        load_config(folder)
    except ConfigError:
        return False
    return True


def _restore_config(file: Path, found: tuple[Path, Mapping[str, Any]] | None) -> None:
    """Write a lost config.yaml anew from what a checkpoint says; its prompts, if they came from a file, lie beside it."""
    if found is None:
        return
    checkpoint, state = found
    log.warning("%s is %s; it is restored from %s.", file, "empty" if file.exists() else "not there", checkpoint)
    held = renamed(state["config"])
    if held["prompts"].get("file") is not None and (file.parent / PROMPTS).is_file():
        held["prompts"] = held["prompts"] | {"file": PROMPTS}
    write_text(file, write_yaml(held))


def _untrained(folder: Path) -> bool:
    """Whether a run's folder holds nothing that an iteration has made."""
    if not {path.name for path in folder.iterdir()} <= UNTRAINED or candidates(folder / CHECKPOINTS, replaced=True):
        return False
    metrics = folder / METRICS
    return not metrics.exists() or not metrics.stat().st_size


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
