"""Examine a run from its config to a dry iteration, and say at the end whether it will work and what it costs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.doctor import examinations
from diffusion_rtb.doctor.finding import Examined, Finding, Verdict, worst
from diffusion_rtb.doctor.patient import NotReached, Patient
from diffusion_rtb.files.plain_text import plain_lines
from diffusion_rtb.out_of_memory import remedied
from diffusion_rtb.run.process_state import rng_state, set_rng_state

__all__ = ["Report", "examine_run", "found_examinations"]

FORMAT = "diffusion_rtb.doctor/1"


@dataclass(frozen=True)
class Report:
    """What all examinations found."""

    name: str
    folder: Path
    examined: Mapping[str, Examined] = field(default_factory=dict)
    """By the name of the examination, in the order of the page."""

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return worst([found.verdict for found in self.examined.values()])

    @property
    def sentence(self) -> str:
        """The conclusion: whether the run will work, and what it costs."""
        reached = {name: found.verdict for name, found in self.examined.items() if found.reached}
        at = {kind: [name for name, verdict in reached.items() if verdict == kind] for kind in ("look", "stop")}
        if at["stop"]:
            return f"This run will not work as it is: {', '.join(at['stop'])}."
        cost = "; ".join(found.cost for found in self.examined.values() if found.cost)
        look = f" Worth a look first: {', '.join(at['look'])}." if at["look"] else ""
        return f"This run will work: {cost}.{look}"

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps(..., allow_nan=False)`; docs/doctor.md has every key."""
        return {
            "format": FORMAT,
            "run": self.name,
            "folder": str(self.folder),
            "verdict": self.verdict,
            "sentence": self.sentence,
            "examinations": {name: found.as_json() for name, found in self.examined.items()},
        }


def found_examinations() -> dict[str, ModuleType]:
    """The files of `doctor/examinations/` by name, in the order of their PLACE."""
    names = [module.name for module in pkgutil.iter_modules(examinations.__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"{examinations.__name__}.{name}") for name in names}
    return dict(sorted(modules.items(), key=lambda item: (item[1].PLACE, item[0])))


def examine_run(
    config: RunConfig,
    folder: Path,
    *,
    processes: int = 1,
    told: Callable[[str, Examined], None] = lambda name, found: None,
    begins: Callable[[str], None] = lambda name: None,
) -> Report:
    """Examine a run. Nothing is written, and the global random generators are as before.

    Args:
        config: The run.
        folder: Where it trains.
        processes: How many would train together.
        told: Told what each examination found, when it has.
        begins: Told the name of each examination before it.

    Raises:
        ValueError: what `train` refuses before it loads anything; see `check_run`.
    """
    random = rng_state()
    try:
        patient, found = Patient(config, folder, processes), {}
        for name, module in found_examinations().items():
            begins(name)
            found[name] = _examined(module, patient)
            told(name, found[name])
        return Report(config.name, folder, found)
    finally:
        set_rng_state(random)


def _examined(module: ModuleType, patient: Patient) -> Examined:
    """What an examination finds; what goes wrong in it would go wrong in training, and is its finding."""
    try:
        with remedied(patient.config, "train"):
            found: Examined = module.examine(patient)
    except NotReached as reason:
        return Examined([Finding("stop", str(reason))], reached=False)
    except Exception as error:  # noqa: BLE001 — a run that fails in a dry iteration is what this is to find
        kind = "" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: "
        return Examined([Finding("stop", plain_lines(f"{kind}{error}"))])
    return found
