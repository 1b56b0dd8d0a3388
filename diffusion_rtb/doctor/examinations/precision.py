"""Does the replay meet the rollout, and how much of the KL will be rounding? At step 0, with the limits that training has."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.training.metrics import check_parity
from diffusion_rtb.training.rounding_floor import asked_tilt, check_floor, reduced_precision, rounding_floor

__all__ = ["PLACE", "examine"]

PLACE = 60


def examine(patient: Patient) -> Examined:
    """`parity` of a dry iteration, and the rounding floor on one micro-batch."""
    train, loaded = patient.config.train, patient.loaded
    if not patient.samples.trajectory.has_density:
        said = "steps of the sampler have no noise: there are no log-densities, so no replay has to meet a rollout"
        return Examined([Finding("ok", said)])
    parity, floor, tilt = patient.dry.first["parity"], _floor(patient), asked_tilt(patient.config, patient.samples)
    precision = reduced_precision(loaded.prior)
    limit = train.parity_tolerance
    text = f"parity {parity:.2g} nats: the replay meets the rollout; training stops above {limit:g} (train.parity_tolerance)"
    findings = [_heard(lambda: check_parity(parity, limit, 0), text)]
    if precision is None:
        said = (
            f"rounding floor {floor:.2g} nats: the network computes in full precision, where training does not judge it"
        )
        findings.append(Finding("ok", said))
    else:
        share = train.rounding_share
        bound = (
            "nothing judges it (train.rounding_share: null)"
            if share is None
            else f"training stops above {share * tilt:.2g}"
        )
        said = f"rounding floor {floor:.2g} nats in {precision}; {bound}"
        findings.append(_heard(lambda: check_floor(floor, tilt, share, precision), said))
    numbers = {
        "parity": parity, "parity_tolerance": limit, "rounding_floor": floor, "precision": precision, "tilt": tilt,
        "rounding_share": train.rounding_share,
    }  # fmt: skip
    return Examined(findings, numbers=numbers)


def _floor(patient: Patient) -> float:
    return rounding_floor(patient.loaded.sampler, patient.samples)


def _heard(check: Callable[[], None], text: str) -> Finding:
    """What one of training's own checks says: an error stops, a warning is worth a look."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            check()
        except ValueError as error:
            return Finding("stop", str(error))
    return Finding("look", str(warned[0].message)) if warned else Finding("ok", text)
