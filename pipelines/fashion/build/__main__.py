"""Rebuild the bundled prior `fashion` and the classifier `fashion-classifier` from Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m pipelines.fashion.build --work runs/fashion-build                     # everything, one stage after another
    python -m pipelines.fashion.build --work runs/fashion-build --stage prior       # one stage; run it again to continue
    python -m pipelines.fashion.build --work runs/fashion-build --data FOLDER       # the four .gz files are elsewhere

Stages resume from atomic checkpoints in the work folder; a training's budget (`--minutes`) is wall time over all its runs, so a
rebuild is alike, not identical. Measured times and numbers are in pipelines/fashion/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.emoji.build.stages import run_stages
from pipelines.fashion import PATH
from pipelines.fashion.build import classifier, data, export, prior

MINUTES = {"prior": 32.0, "classifier": 10.0}
STAGES = ("prior", "classifier", "export", "sheet", "report")
CLASSIFIER = PATH.parents[2] / "rewards" / "fashion_classifier"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that the command line names."""
    folders = {
        "data": (data.FOLDER, "folder with the four .gz files"),
        "prior": (PATH, "where to write the prior"),
        "classifier": (CLASSIFIER, "where to write the classifier"),
    }
    run_stages(__doc__, STAGES, run, folders, arguments)


def run(stage: str, options: argparse.Namespace) -> None:
    """Run one stage."""
    work: Path = options.work
    pictures = data.load("t10k" if stage == "report" else "train", options.data)
    minutes = options.minutes or MINUTES.get(stage, 0)

    def exported() -> None:
        export.export_denoiser(work, options.prior, licences=PATH)
        export.export_classifier(work, options.classifier, licences=PATH)

    actions: dict[str, Callable[[], object]] = {
        "prior": lambda: prior.train(pictures.images, work, minutes),
        "classifier": lambda: classifier.train(pictures, work, minutes),
        "export": exported,
        "sheet": lambda: export.sheet(options.prior, options.prior.parent / "sheet.png"),
        "report": lambda: export.report(pictures, options.prior, options.classifier),
    }
    actions[stage]()


if __name__ == "__main__":
    main()
