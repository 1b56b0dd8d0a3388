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
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipelines.fashion import PATH
from pipelines.fashion.build import classifier, data, export, prior

MINUTES = {"prior": 32.0, "classifier": 10.0}
STAGES = ("prior", "classifier", "export", "sheet", "report")
CLASSIFIER = PATH.parents[2] / "rewards" / "fashion_classifier"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="folder with the four .gz files")
    parser.add_argument("--minutes", type=float, help="budget of a training stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prior", type=Path, default=PATH, help="where to write the prior")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="where to write the classifier")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        logging.info("stage %s", stage)
        run(stage, options)


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
