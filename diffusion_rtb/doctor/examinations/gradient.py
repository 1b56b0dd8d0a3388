"""Does every trained parameter get a gradient, and is it one that clipping leaves anything of?"""

from __future__ import annotations

from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient

__all__ = ["PLACE", "examine"]

PLACE = 65

CLIPPED = 100.0
"""Norm over train.grad_clip from where on the clipping decides more than the learning rate."""


def examine(patient: Patient) -> Examined:
    """The norm of the first gradient."""
    dry, limit = patient.dry, patient.config.train.grad_clip
    norm, untouched, count = dry.first["gradient_norm"], dry.untouched, len(patient.loaded.prior.parameters())
    text = f"the first gradient has norm {norm:.3g}; train.grad_clip is {limit:g}"
    if norm == 0:
        alike = float(patient.samples.reward.std(correction=0)) == 0
        text += ": nothing is learned from " + ("rewards that are all alike" if alike else "these trajectories")
        finding = Finding(
            "look" if alike else "stop", text, "look at the reward's spread, and at posterior.target_modules"
        )
    elif norm > CLIPPED * limit:
        text += f": it is scaled down {norm / limit:.0f} times, so that every update has the same size"
        finding = Finding("look", text, "a smaller beta, or train.grad_clip higher and train.lr lower")
    else:
        finding = Finding("ok", text)
    findings = [finding]
    if untouched:
        said = f"{untouched} of {count} trained parameters get no gradient: the pipeline does not call what they are in"
        findings.append(Finding("look", said, "posterior.target_modules without them"))
    return Examined(findings, numbers={"norm": norm, "untouched": untouched, "parameters": count})
