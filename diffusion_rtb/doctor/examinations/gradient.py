"""Does every trained parameter get a gradient, is it one that clipping leaves anything of, and how far does an update go?"""

from __future__ import annotations

import torch

from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.interfaces import Prior

__all__ = ["PLACE", "examine"]

PLACE = 65

CLIPPED = 100.0
"""Norm over train.grad_clip from where on the clipping decides more than the learning rate."""


HASTY = 1e-3
"""Share of its size by which an update may move a weight that was trained before; the bundled prior did not bear 1.7e-3."""


def examine(patient: Patient) -> Examined:
    """The norm of the first gradient; of weights that are trained in full also the size of an update."""
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
    numbers = {"norm": norm, "untouched": untouched, "parameters": count}
    if patient.config.posterior.get("full"):
        share = patient.config.train.lr / _size(patient.loaded.prior)
        findings.append(_step(share, patient.config.train.lr))
        numbers["step"] = share
    return Examined(findings, numbers=numbers)


def _size(prior: Prior) -> float:
    """The root mean square of the trained numbers."""
    norms = torch.stack([parameter.detach().double().norm().cpu() for parameter in prior.parameters().values()])
    return float(norms.norm()) / sum(parameter.numel() for parameter in prior.parameters().values()) ** 0.5


def _step(share: float, lr: float) -> Finding:
    text = f"AdamW moves a weight by about train.lr={lr:g} an update, {share:.2g} of their size (root mean square)"
    remedy = f"train.lr={lr * HASTY / share / 4:.0e}: whole weights want far less than a LoRA, which begins at 0"
    return Finding("look", text, remedy) if share > HASTY else Finding("ok", text)
