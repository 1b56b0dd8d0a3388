"""What the networks and the posterior will take, by the headers of their files: known before a single weight is read."""

from __future__ import annotations

import torch

from diffusion_rtb.abilities import SizedAhead
from diffusion_rtb.config.component_shape import loads_weights
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.room import Room, expected_device, room_of
from diffusion_rtb.doctor.sizes import Header, network_header
from diffusion_rtb.doctor.words import count_text
from diffusion_rtb.files.whole import size_text

__all__ = ["PLACE", "TRAINED", "examine"]

PLACE = 30

TRAINED = 16
"""Bytes that a trained number takes: itself, its gradient and AdamW's two moments, in float32."""


def examine(patient: Patient) -> Examined:
    """Weights and posterior against the memory of the device; too large, and nothing is loaded."""
    described = patient.components.prior
    prior = described.construct() if loads_weights(described.target) else None
    files = prior.weight_files() if isinstance(prior, SizedAhead) else {}
    if not isinstance(prior, SizedAhead) or not files:
        return Examined([Finding("ok", "no files here that would say it: see memory, once they are loaded")])
    dtype = getattr(torch, prior.dtype)
    headers = {name: network_header(paths, dtype) for name, paths in files.items()}
    trained = prior.trained_numbers(**patient.config.posterior)
    room = room_of(expected_device(patient.config))
    weights = sum(header.loaded for header in headers.values())
    rows = [(name, _network(header, prior.dtype)) for name, header in headers.items()]
    rows.append(("posterior", f"{count_text(trained)} numbers, {size_text(TRAINED * trained)} with gradient and AdamW"))
    finding = _judged(weights + TRAINED * trained, room, prior.dtype, full=bool(patient.config.posterior.get("full")))
    if finding.verdict == "stop":
        patient.closed = "the weights do not fit"
    numbers = {
        "networks": {name: vars(header) for name, header in headers.items()}, "dtype": prior.dtype, "trained": trained,
        "bytes": weights, "trained_bytes": TRAINED * trained, "device": room.device, "free": room.free, "total": room.total,
    }  # fmt: skip
    return Examined([finding], rows, numbers)


def _network(header: Header, dtype: str) -> str:
    stored = f", stored as {header.stored}" if header.on_disk != header.loaded else ""
    return f"{count_text(header.numbers)} numbers, {size_text(header.loaded)} in {dtype}{stored}"


def _judged(needed: int, room: Room, dtype: str, *, full: bool) -> Finding:
    text = f"{size_text(needed)} by the headers of the weight files, {size_text(room.free)} of {size_text(room.total)} are free on "
    text += room.device
    remedy = "prior.dtype=bfloat16 halves the weights (docs/precision.md), or a smaller model"
    remedy = remedy if dtype == "float32" else "a smaller model, or another device"
    remedy = f"a LoRA (posterior.full=false), posterior.target_modules, or {remedy}" if full else remedy
    if needed > room.total:
        return Finding("stop", f"{text}: they do not fit, so nothing is loaded", remedy)
    if needed > room.free:
        return Finding("look", f"{text}: others have taken what they need", "free that memory first")
    return Finding("ok", text)
