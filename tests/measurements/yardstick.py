"""All methods at equal cost, each with its own learning rate.

    python -m tests.measurements.yardstick CONFIG OUT --budget COST=NUMBER [--tuning SHARE] [--betas B ...]

CONFIG has its methods in compare/NAME.yaml beside it. Three things are done for each of them, all of it ordinary runs in OUT:

1. Two iterations, to know what one costs: then as many as the budget pays, so that the rate falls to 0 at its end.
2. One run at each of three learning rates, a third of the config's, the config's and three times that, with a seed of their own,
   for `--tuning` of the budget. The one with the highest ELBO is taken; of rates whose ELBO is equal to the third digit, the
   smaller.
3. The runs that are reported, on `--seeds` other seeds, at each of `--betas`: the rate is that of the config's beta.

It is resumable, a run at a time. What was chosen is in OUT/chosen.yaml, variants for `diffusion-rtb compare`; the table and the
figure are in OUT/NAME-compare. With `--betas` these are OUT/beta-B.yaml and OUT/NAME-beta-B-compare.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusion_rtb.comparison.cost import Budget
from diffusion_rtb.comparison.figure import draw_figure
from diffusion_rtb.comparison.plan import plan, run
from diffusion_rtb.comparison.results import Comparison
from diffusion_rtb.comparison.table import markdown, write_tables
from diffusion_rtb.config.load import load_config
from diffusion_rtb.config.yaml_text import read_yaml
from diffusion_rtb.files.whole import write_text
from diffusion_rtb.run.metrics_file import METRICS, read_rows

log = logging.getLogger(__name__)

TUNING_SEED = 1000
RATES = (1 / 3, 1.0, 3.0)

Methods = Mapping[str, Mapping[str, Any]]


def with_train(method: Mapping[str, Any], **train: Any) -> dict[str, Any]:
    """The variant with further keys of `train`."""
    return {**method, "train": {**method.get("train", {}), **train}}


class Yardstick:
    """One invocation.

    Args:
        config: With its methods beside it.
        out: Folder of all runs.
        budget: What one run may cost.
        overrides: Of every run.
    """

    def __init__(self, config: Path, out: Path, budget: Budget, overrides: Sequence[str] = ()) -> None:
        self.config, self.out, self.budget = config, out, budget
        self.overrides = [*overrides, f"out={out}"]
        self.base = load_config(config, self.overrides)

    def methods(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the config's file, all if none is named."""
        file = self.config.parent / "compare" / self.config.name
        known = dict(read_yaml(file.read_text(encoding="utf-8"))["objectives"])
        return {name: dict(known[name]) for name in names or known}

    def compared(self, name: str, methods: Methods, seeds: int, *overrides: str, **looks: Any) -> Comparison:
        """A comparison of these methods under this name."""
        file = self.out / f"{name}.yaml"
        write_text(file, yaml.safe_dump({"objectives": dict(methods)}, sort_keys=False))
        changes = [
            *self.overrides,
            f"name={self.base.name}-{name}" if name != "chosen" else f"name={self.base.name}",
            *overrides,
        ]
        cost: Any = self.budget.cost
        work = plan(self.config, list(methods), ["config"], seeds, changes, variants=file, cost=cost, **looks)
        for (method, _), why in work.refused.items():
            log.warning("%s is left out: %s", method, why)

        def written(so_far: Comparison) -> None:
            write_tables(so_far)

        found = run(work, log.info, written)
        if not found.complete:
            raise KeyboardInterrupt
        return found

    def within_budget(self, methods: Methods, share: float = 1.0) -> dict[str, dict[str, Any]]:
        """Each with as many iterations as this share of the budget pays."""
        found = self.compared(
            "costs", methods, 1, "train.iterations=2", f"seed={TUNING_SEED}", samples=8, points=0, point_samples=4
        )
        key, planned = f"training_{self.budget.cost}", {}
        for method, _ in found.results:
            folder = found.plan.folder / "runs" / f"{method}.config.{TUNING_SEED}"
            rows, _ = read_rows(folder / METRICS)
            first, second = (rows[i][key] for i in (0, 1))
            assert first is not None
            assert second is not None
            iterations = 1 + math.floor((share * self.budget.amount - first) / (second - first))
            if iterations < 1:
                log.warning("%s is left out: its first iteration costs %g.", method, first)
                continue
            planned[method] = with_train(methods[method], iterations=iterations)
        return planned

    def tuned(self, methods: Methods) -> dict[str, float]:
        """The learning rate of the highest ELBO for each."""
        rates = {rate: float(f"{rate * self.base.train.lr:.2g}") for rate in RATES}
        tried = {
            f"{name}-{i}": with_train(method, lr=rates[rate])
            for name, method in methods.items()
            for i, rate in enumerate(RATES)
        }
        found = self.compared("tuning", tried, 1, f"seed={TUNING_SEED}", points=0)
        elbo = {f"{name}-{i}": -math.inf for name in methods for i in range(len(RATES))}  # of a run that diverged
        elbo |= {pair[0]: runs[0][1].numbers["elbo"] for pair, runs in found.results.items()}
        chosen = {}
        for name in methods:
            best = max(range(len(RATES)), key=lambda i, name=name: (round(elbo[f"{name}-{i}"], 3), -i))  # type: ignore[misc]
            log.info("%s: ELBO %s", name, [round(elbo[f"{name}-{i}"], 3) for i in range(len(RATES))])
            chosen[name] = rates[RATES[best]]
        return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, train, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run's config")
    parser.add_argument("--budget", type=Budget.of, required=True, metavar="COST=NUMBER")
    parser.add_argument("--objectives", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--tuning", type=float, default=1.0, metavar="SHARE", help="of the budget, for a run that tunes"
    )
    parser.add_argument("--betas", type=float, nargs="+", default=[], metavar="B", help="instead of the config's")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    work = Yardstick(options.config, options.out, options.budget, options.overrides)
    methods = work.methods(options.objectives)
    rates = work.tuned(work.within_budget(methods, options.tuning))
    full = work.within_budget(methods)
    chosen = {name: with_train(full[name], lr=rate) for name, rate in rates.items()}
    changes = {f"beta-{beta:g}": [f"beta={beta}"] for beta in options.betas} or {"chosen": []}
    for name, overrides in changes.items():
        found = work.compared(name, chosen, options.seeds, *overrides)
        draw_figure(found)
        sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
