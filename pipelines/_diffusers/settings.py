"""Checks of a Stable Diffusion prior's settings that need no file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "check_device",
    "check_dtype",
    "check_guidance",
    "check_same_prior",
    "check_size",
    "default_device",
    "number_of_steps",
    "own_size",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not know or cannot see here."""
    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a torch device ({error}); write for example 'cpu' or 'cuda:0'."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA device here; set device: cpu, or leave it out.")


def check_guidance(guidance: float, tilted_prior: str | None, negative_prompt: str | None) -> None:
    """Refuse scales below 1 and settings that contradict the scale: they would be silently ignored."""
    if not 1 <= guidance < float("inf"):
        raise ValueError(
            f"guidance={guidance}: a guidance scale is a number >= 1; 1 samples the conditional model itself."
        )
    if tilted_prior not in (None, "guided", "unguided"):
        raise ValueError(f"tilted_prior={tilted_prior!r} is unknown; choose 'guided' or 'unguided'.")
    actual = "guided" if guidance > 1 else "unguided"
    if tilted_prior not in (None, actual):
        remedy = "set guidance=1.0" if tilted_prior == "unguided" else "set guidance above 1, for example 5.0"
        raise ValueError(
            f"tilted_prior={tilted_prior!r}, but guidance={guidance} samples the {actual} chain, and a posterior is exact only for "
            f"the chain it is trained on: {remedy}, or tilted_prior={actual!r}."
        )
    if negative_prompt and guidance == 1:
        raise ValueError(
            f"negative_prompt={negative_prompt!r} has no effect at guidance=1: raise guidance, or leave it out."
        )


def check_size(steps: int, height: int | None, width: int | None, decode_batch: int) -> None:
    """Refuse counts below 1 and image sizes that are not a multiple of the autoencoder's factor 8."""
    if steps < 1 or decode_batch < 1:
        raise ValueError(f"steps={steps} and decode_batch={decode_batch} must both be at least 1.")
    if (height is None) != (width is None):
        raise ValueError(f"height={height} and width={width}: give both, or neither for the model's own size.")
    if any(side is not None and (side < 8 or side % 8) for side in (height, width)):
        raise ValueError(f"height={height} and width={width} must be positive multiples of 8.")


def number_of_steps(steps: int | None, timesteps: Sequence[int] | None) -> int:
    """Denoising steps T: `steps`, or one for each of `timesteps`; 50 if neither is given.

    Raises:
        ValueError: both are given and disagree, or `timesteps` is empty.
    """
    if timesteps is None:
        return 50 if steps is None else steps
    if not timesteps or steps not in (None, len(timesteps)):
        raise ValueError(f"steps={steps}, but there are {len(timesteps)} timesteps: give one of the two.")
    return len(timesteps)


def check_same_prior(own: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Refuse to run a posterior on another prior than it was trained on; warn about another sampler.

    Args:
        own: Fingerprint of the prior at hand, with its adapters attached.
        trained: Fingerprint stored with the adapters.
    """
    was, now = _in_words(trained["guidance"]), _in_words(own["guidance"])
    if was != now:
        raise ValueError(
            f"This posterior was trained on the {was} and would now run on the {now}: what comes out would be a sample of "
            "neither posterior. Use the guidance it was trained with, or train with the guidance you want to sample with."
        )
    # Rounding to another dtype changes the digest of the weights, not the model.
    keys = ["family", "dims", "adapter", *(["weights"] if trained["dtype"] == own["dtype"] else [])]
    different = [key for key in keys if trained[key] != own[key]]
    if different:
        before, after = ({key: side[key] for key in different} for side in (trained, own))
        raise ValueError(
            f"This posterior belongs to another prior: trained with {before}, now {after}. Use the prior it was trained on."
        )
    if trained["sampler"] != own["sampler"]:
        warnings.warn(
            f"The posterior was trained with the sampler {trained['sampler']} and now runs with {own['sampler']}; it is exact "
            "only for the chain it was trained on.",
            stacklevel=3,
        )


def _in_words(settings: Mapping[str, Any]) -> str:
    """The `guidance` entry of a fingerprint, for a message."""
    negative = f", negative prompt {settings['negative_prompt']!r}" if settings["negative_prompt"] else ""
    return f"{settings['tilted_prior']} prior (guidance {settings['scale']:g}{negative})"


def default_device() -> torch.device:
    """Where accelerate runs this process."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def own_size(pipe: Any) -> tuple[int, int]:
    """Image size the network was trained at: (height, width) in pixels."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
