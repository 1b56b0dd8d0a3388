"""How the commands speak about errors: one message that says what is wrong, on the error stream, and an exit code."""

from __future__ import annotations

import traceback as traceback_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from diffusion_rtb.config.component_errors import place
from diffusion_rtb.config.load import ConfigError
from diffusion_rtb.files.terminal import say

__all__ = ["EXTRAS", "INTERRUPTED", "Traceback", "WhichCheckpoint", "errors_explained", "say"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")]

WhichCheckpoint = Annotated[
    str, typer.Option("--checkpoint", help="latest, best (by the policy of `watch`), or an iteration that was kept.")
]

EXTRAS = {
    "starlette": "server",
    "uvicorn": "server",
    "google": "siglip",
    "sentencepiece": "siglip",
    "rapidocr_onnxruntime": "ocr",
    "onnxruntime": "ocr",
    "ot": "compare",
    "torch_fidelity": "fid",
    "bitsandbytes": "bnb",
    "resvg_py": "build",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
"""Module -> the extra of this package that brings it."""

SPOKEN = (ValueError, TypeError, RuntimeError, OSError)
"""Kinds of which the message alone is a sentence; that of a KeyError is a key."""


@contextmanager
def errors_explained(traceback: bool) -> Iterator[None]:
    """Say what is wrong in one message; 2 is a config that cannot be used, 1 anything else.

    An exception of any class is caught, also of modules that a config names; with `traceback` it is raised as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        # typer's own ways of leaving are exceptions too.
        if traceback or isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
            raise
        say(f"error: {_sentence(error)}", style="bold red")
        if not isinstance(error, ConfigError):
            say(_hint(error), style="dim")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def _sentence(error: Exception) -> str:
    """The message, with what it lacks: the kind, the component, the package to install."""
    text = str(error)
    if not text or not isinstance(error, SPOKEN):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    parts = [text, *getattr(error, "__notes__", ())]
    if isinstance(error, ImportError):
        parts.append(_remedy(error))
    if _while_launching(error):
        parts.append(
            "It came from accelerate's launch settings (accelerate config, accelerate launch, ACCELERATE_* variables); one device "
            "needs none of them, and DeepSpeed, FSDP and Megatron are not used."
        )
    return "\n".join(parts)


def _while_launching(error: Exception) -> bool:
    """Was it raised while accelerate set itself up?"""
    frames = (frame for frame, _ in traceback_module.walk_tb(error.__traceback__))
    places = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames}
    return bool({("accelerate.accelerator", "__init__"), ("accelerate.state", "__init__")} & places)


def _remedy(error: ImportError) -> str:
    top = (error.name or "").partition(".")[0]
    if top in EXTRAS:
        return f"Install it: pip install 'diffusion-rtb[{EXTRAS[top]}]'."
    if isinstance(error, ModuleNotFoundError) and top:
        return f"Install the package that has the module {top!r}, e.g. pip install {top}, into the environment of this command."
    return "A library is missing or of a version that does not fit."


def _hint(error: Exception) -> str:
    """Where to look further; an exception of this package that is no refusal is a fault of this package."""
    found = place(error.__cause__ or error)
    unforeseen = not isinstance(error, SPOKEN) and not getattr(error, "__notes__", ())
    # A refusal of our own says all there is to say; a line of ours would only distract.
    where = f" in {found}" if found and (unforeseen or Path(found).is_absolute()) else ""
    fault = "; this may be a fault of diffusion-rtb" if unforeseen else ""
    return f"[{type(error).__name__}{where}{fault}; --traceback shows where]"
