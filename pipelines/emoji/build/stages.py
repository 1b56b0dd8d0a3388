"""The command line of a rebuild: one stage after another, or one by name."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["run_stages"]


def run_stages(
    about: str | None,
    stages: Sequence[str],
    run: Callable[[str, argparse.Namespace], None],
    folders: Mapping[str, tuple[Path, str]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run the stages that the command line names.

    Args:
        about: What `--help` says.
        stages: In their order.
        run: Runs one of them with the options `work`, `minutes`, `threads` and each of the folders.
        folders: Option -> its default, and what `--help` says of it.
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*stages, "all"), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, checkpoints and caches")
    parser.add_argument("--minutes", type=float, help="budget of a training stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, (folder, what) in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=folder, help=what)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in stages if options.stage == "all" else (options.stage,):
        logging.info("stage %s", stage)
        run(stage, options)
