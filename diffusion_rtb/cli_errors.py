"""How the commands speak: one message about what is wrong, on the error stream, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from diffusion_rtb.config import ConfigError
from diffusion_rtb.terminal import say

__all__ = ["INTERRUPTED", "Traceback", "errors_explained", "say"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")]


@contextmanager
def errors_explained(traceback: bool) -> Iterator[None]:
    """Say what is wrong in one message; 2 is a config that cannot be used, 1 anything else."""
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        # typer's own way of leaving is a RuntimeError too.
        if traceback or isinstance(error, typer.Exit):
            raise
        say(f"error: {error}", style="bold red")
        hint = "" if isinstance(error, ConfigError) else f" [{type(error).__name__}; --traceback shows where]"
        if hint:
            say(hint.strip(), style="dim")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
