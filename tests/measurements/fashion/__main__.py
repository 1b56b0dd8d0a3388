"""Class posteriors of Fashion-MNIST by every method, as Table 2 of the RTB paper, with the two rows it lacks.

    python -m tests.measurements.fashion --targets sneaker dress bag tops                 # everything that is not there yet
    python -m tests.measurements.fashion --targets coat --methods rtb ddpo                # some rows
    python -m tests.measurements.fashion prior.device=cuda --targets coat                 # overrides of all configs come first
    python -m tests.measurements.fashion --table                                          # write the table of what there is

Give it again to go on: rows that are finished are not repeated, trainings go on at their last checkpoint, and the numbers are in
tests/measurements/fashion/results.json, from which the table in docs/fashion.md is written after each row. It needs the data set
(`apt-get install dataset-fashion-mnist`, or --data FOLDER).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.comparison.variants import load_variants
from diffusion_rtb.files.whole import write_json
from pipelines.fashion.build import data
from pipelines.fashion.build.export import tile
from tests.measurements.fashion.picture import draw_picture
from tests.measurements.fashion.rows import CONFIG, GUIDED, TARGETS, TRAINED, Table
from tests.measurements.fashion.table import NAMES, write_table

RESULTS, PAGE = Path(__file__).with_name("results.json"), Path("docs/fashion.md")
METHODS = ("prior", "reweighted", "real", *GUIDED, *TRAINED)
SHEET = 48
PICTURED, PICTURE = "sneaker", Path("docs/fashion.png")

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are asked for, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run's config")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sneaker", "dress", "bag", "tops"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-table"), help="trajectories, runs and sheets")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="folder of the data set")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = Table(options.out, options.data, load_variants(CONFIG), tuple(options.overrides))
    for target in () if options.table else options.targets:
        for method in options.methods:
            if method not in read().get(target, {}):
                make(work, target, method)
                write_table(read(), PAGE)
    write_table(read(), PAGE)
    if (options.out / f"{PICTURED}.prior.png").is_file():
        draw_picture(options.out, PICTURED, NAMES, PICTURE)


def make(work: Table, target: str, method: str) -> None:
    """One row: its numbers into the results, its first pictures into a sheet."""
    log.info("%s by %s", target, method)
    numbers, images = work.row(target, method)
    log.info("%s", numbers)
    work.out.mkdir(parents=True, exist_ok=True)
    tile(images[:SHEET, :1] * 2 - 1, 12).save(work.out / f"{target.replace(' ', '-')}.{method}.png")
    held = read()
    held.setdefault(target, {})[method] = {
        name: value if value is None else float(f"{value:.6g}") for name, value in numbers.items()
    }
    held["hardware"] = f"{os.cpu_count()} virtual cores of {processor()}, float32"
    write_json(RESULTS, held, indent=1)


def read() -> dict[str, Any]:
    """What is measured already, by target and method."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def processor() -> str:
    """Its name, where the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
