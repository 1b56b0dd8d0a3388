"""What the run is made of, checked as `train` checks it, and whether its folder is free for it."""

from __future__ import annotations

import os
from pathlib import Path

from diffusion_rtb.config.load import Component
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.words import arguments_text
from diffusion_rtb.run.checkpoint_reading import latest_state
from diffusion_rtb.run.folder import CHECKPOINTS, check_same, is_run

__all__ = ["PLACE", "examine"]

PLACE = 10

WIDTH = 120
"""Characters of a component's line."""


def examine(patient: Patient) -> Examined:
    """One line per component, warnings of the checks, and the state of the run's folder."""
    config = patient.config
    rows = [
        ("prior", _line(config.prior)),
        ("posterior", arguments_text(config.posterior, WIDTH) or "as the prior makes it"),
    ]
    rows += [("reward", _line(config.reward)), ("objective", _line(config.objective))]
    rows += [("behaviour", _line(behaviour)) for behaviour in config.behaviours]
    rows.append(("beta", _beta(patient)))
    warned = dict.fromkeys(str(warning.message) for warning in patient.warned if warning.category is UserWarning)
    findings = [Finding("ok", "every key, name and argument is known, and they fit together")]
    findings += [Finding("look", text) for text in warned]
    findings.append(_folder(patient))
    return Examined(findings, rows, {"name": config.name, "folder": str(patient.folder)})


def _line(component: Component) -> str:
    held = arguments_text(component, WIDTH)
    return f"{component.component}: {held}" if held else component.component


def _beta(patient: Patient) -> str:
    beta = patient.config.beta
    if beta.kl_budget is not None:
        return f"moves until the KL is {beta.kl_budget.nats:g} nats, from {beta.value:g}"
    return f"{beta.value:g} (nats per unit of reward)" + (", annealed" if beta.anneal is not None else "")


def _folder(patient: Patient) -> Finding:
    """Would `train` take this folder, and what is in it?"""
    folder = patient.folder
    try:
        check_same(patient.config, folder)
    except ValueError as error:
        return Finding("stop", str(error))
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Finding("stop", f"{place} is not writable, so {folder} cannot be written.", "out=ANOTHER_FOLDER")
    return Finding("ok", _state(patient, folder))


def _state(patient: Patient, folder: Path) -> str:
    if not is_run(folder):
        return f"the run's folder {folder} is free"
    held = latest_state(folder / CHECKPOINTS)
    if held is None:
        return f"{folder} is this run's; nothing is trained in it yet"
    done, asked = int(held[1]["iteration"]), patient.config.train.iterations
    return f"{folder} is this run's: it has {done} of {asked} iterations, and goes on from there"
