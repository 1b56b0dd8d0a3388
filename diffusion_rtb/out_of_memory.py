"""Out of memory: known in whatever words a back end says it, and said with what was being done and the settings that help."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from diffusion_rtb.config.arguments import defaults
from diffusion_rtb.config.components import locate

if TYPE_CHECKING:
    from diffusion_rtb.config.sections import RunConfig

__all__ = ["OutOfMemoryError", "doing", "is_out_of_memory", "remedied", "smaller_settings"]

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "alloc_failed")
"""In what CUDA, ROCm, MPS and XPU say; torch of the host on Linux and Windows; cuBLAS and cuDNN."""


class OutOfMemoryError(RuntimeError):
    """A device, or the host, has no memory left.

    Args:
        doing: What was being done, e.g. "drawing trajectories"; None: not known.
        error: What the back end raised.
        remedy: What to do.
    """

    def __init__(self, doing: str | None, error: BaseException, remedy: str = "") -> None:
        self.doing, self.source, self.remedy = doing, _source(error) or error, remedy
        said = str(self.source).strip().partition("\n")[0][:160].rstrip(". ") or type(self.source).__name__
        found = f"Out of memory{f' while {doing}' if doing else ''} ({said})."
        super().__init__(f"{found} {remedy}" if remedy else found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory, or came of one that is: that of a reward is wrapped in an error about the reward."""
    return _source(error) is not None


def _source(error: BaseException | None) -> BaseException | None:
    """The first error of the chain of causes that is about memory."""
    found = None
    while error is not None:
        if isinstance(error, OutOfMemoryError):
            return error.source
        said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)
        if said or isinstance(error, torch.OutOfMemoryError | MemoryError):
            found = error
        error = error.__cause__
    return found


@contextmanager
def doing(what: str) -> Iterator[None]:
    """An error about memory in the block says that this was being done; of nested blocks the innermost is named.

    What the failed calls held is let go of: whoever saves what is there needs the room.

    Raises:
        OutOfMemoryError: the block ran out of memory.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = OutOfMemoryError(what, error)
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise found from error


Command = Literal["train", "eval", "sample"]


@contextmanager
def remedied(
    config: RunConfig, command: Command, *, batch: int | None = None, kept: Callable[[], str] = str
) -> Iterator[None]:
    """An error about memory in the block names the settings of the run that help.

    Args:
        config: The run.
        command: Which of its sizes are in use.
        batch: What `sample` draws at once.
        kept: A sentence on what is not lost.

    Raises:
        OutOfMemoryError: the block ran out of memory.
    """
    try:
        with doing(""):
            yield
    except OutOfMemoryError as error:
        if error.remedy:
            raise
        settings = "".join(f"\n  {line}" for line in smaller_settings(config, command, batch))
        remedy = f"Less memory is taken, at the same results up to rounding, by:{settings}" if settings else ""
        raise OutOfMemoryError(error.doing, error, "\n".join(filter(None, [remedy, kept()])) or NOTHING_LEFT) from error


NOTHING_LEFT = "All sizes of the run are as small as they get."

PRIOR = {
    "gradient_checkpointing": "prior.memory.gradient_checkpointing=true (it is false): activations are computed twice",
    "offload": "prior.memory.offload=all (it is null): of text encoders, network and VAE only the one in use is on the device",
}
"""Members of a prior's `memory`, and what they do."""


def smaller_settings(config: RunConfig, command: Command, batch: int | None = None) -> list[str]:
    """The settings that make a run take less memory, `key=value (it is ...): what that does` each, the best first.

    Those of a prior that its constructor has; what is as small as it gets is left out. See `remedied` for the arguments.
    """
    train, given = config.train, config.prior.model_extra or {}
    takes = defaults(locate(config.prior.component, "prior"))
    if command == "train":
        whole = train.prompts_per_iteration * train.group
        found = [_halved("train.micro_batch", train.micro_batch, "trajectories on the device at once", whole)]
    else:
        key = "eval.batch" if command == "eval" else "--batch"
        found = [_halved(key, batch or config.eval.batch, "samples on the device at once")]
    on = given.get("memory") or {}
    names = [name for name in PRIOR if name != "gradient_checkpointing" or command == "train"]
    if "memory" in takes:
        found += [PRIOR[name] for name in names if not on.get(name)]
    if "decode_batch" in takes:
        now = given.get("decode_batch", takes["decode_batch"])
        found.append(_halved("prior.decode_batch", now, "samples decoded at once"))
    return [line for line in found if line]


def _halved(key: str, now: int, what: str, whole: int | None = None) -> str:
    """Half of a count, or the largest divisor of `whole` up to there; nothing for a count of 1."""
    fitting = [n for n in range(1, now // 2 + 1) if whole is None or whole % n == 0]
    return f"{key}={fitting[-1]} (it is {now}): {what}" if fitting else ""
