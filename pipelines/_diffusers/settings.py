"""Checks of a prior's settings that need no file."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch

from pipelines._diffusers.guidance import TiltedPrior
from pipelines._diffusers.scheduler import takes_eta
from pipelines._models.memory import Memory
from pipelines._models.speed import Speed

__all__ = [
    "DTYPES",
    "PriorSettings",
    "TextSettings",
    "check_device",
    "check_dtype",
    "check_plain",
    "check_run",
    "check_size",
    "check_timesteps",
    "default_device",
    "number_of_steps",
    "own_size",
]

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PriorSettings(TypedDict, total=False):
    """The arguments of every `DiffusersPrior`, which a family hands on: `**settings: Unpack[PriorSettings]`."""

    steps: int | None
    timesteps: Sequence[int] | None
    eta: float
    scheduler: str | None
    scheduler_arguments: Mapping[str, Any] | None
    dtype: Dtype
    device: str | None
    memory: Memory | None
    speed: Speed | None
    decode_batch: int
    vae: str | None
    lora: str | None
    lora_scale: float
    textual_inversions: Mapping[str, str]
    config: str | None
    variant: str | None
    revision: str | None


class TextSettings(PriorSettings, total=False):
    """The arguments of every `TextToImage`, likewise."""

    guidance: float
    tilted_prior: TiltedPrior | None
    negative_prompt: str | None
    height: int | None
    width: int | None
    max_sequence_length: int | None


def check_dtype(dtype: str, known: Iterable[str] = tuple(DTYPES)) -> None:
    """Refuse a dtype that is not known."""
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(known)}.")


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


def check_run(dtype: str, device: str | None, decode_batch: int) -> None:
    """Refuse what `check_dtype` and `check_device` refuse, and decoding no image at once."""
    check_dtype(dtype)
    check_device(device)
    if decode_batch < 1:
        raise ValueError(f"decode_batch={decode_batch} must be at least 1.")


def check_size(height: int | None, width: int | None, multiple: int) -> None:
    """Refuse image sizes that are not a multiple of what the autoencoder and the network divide them by."""
    if (height is None) != (width is None):
        raise ValueError(f"height={height} and width={width}: give both, or neither for the model's own size.")
    if any(side is not None and (side < multiple or side % multiple) for side in (height, width)):
        raise ValueError(f"height={height} and width={width} must be positive multiples of {multiple}.")


def number_of_steps(steps: int | None, timesteps: Sequence[int] | None) -> int:
    """Denoising steps T: `steps`, or one for each of `timesteps`; 50 if neither is given.

    Raises:
        ValueError: both are given and disagree, `timesteps` is empty, or `steps` is below 1.
    """
    if timesteps is None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        return 50 if steps is None else steps
    if not timesteps or steps not in (None, len(timesteps)):
        raise ValueError(f"steps={steps}, but there are {len(timesteps)} timesteps: give one of the two.")
    return len(timesteps)


def check_timesteps(pipeline: str, timesteps: Sequence[int] | None) -> None:
    """Refuse timesteps of one's own for a pipeline of diffusers whose call takes none."""
    import diffusers

    call = inspect.signature(getattr(diffusers, pipeline).__call__)
    if timesteps is not None and "timesteps" not in call.parameters:
        raise ValueError(f"timesteps={list(timesteps)}, but {pipeline} takes no timesteps: give steps.")


def check_plain(scheduler: Any, pipeline: str, *, eta: bool) -> None:
    """Refuse a scheduler that wants more of the loop than this pipeline does.

    Args:
        scheduler: The sampler.
        pipeline: Of a pipeline that starts at standard normal noise and hands its states to the network as they are.
        eta: Whether it passes eta on.

    Raises:
        ValueError: the scheduler scales its states, or takes an eta that it would not be given.
    """
    name, start = type(scheduler).__name__, float(getattr(scheduler, "init_noise_sigma", 1.0))
    wanted = f"it starts at a deviation of {start:.3g} and scales its states" if start != 1 else ""
    if not wanted and takes_eta(scheduler) and not eta:
        wanted = "its steps take eta"
    if wanted:
        raise ValueError(
            f"{name} and {pipeline}: {wanted}, and the pipeline does nothing of the kind, so its samples would be others than the "
            "model's. Choose DDPMScheduler, or DPMSolverMultistepScheduler with scheduler_arguments {algorithm_type: "
            "sde-dpmsolver++, solver_order: 1}."
        )


def default_device() -> torch.device:
    """Where accelerate runs this process."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def own_size(network: Any, factor: int) -> tuple[int, int]:
    """Image size (height, width), in pixels, that a denoiser of latents was trained at.

    Args:
        network: Its config says the size of the latents.
        factor: Pixels per latent.
    """
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor
