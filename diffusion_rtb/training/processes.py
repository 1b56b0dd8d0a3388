"""Several processes as one run: who has which prompts, what all of them know, and that none waits for one that has failed.

Before every collective the processes *meet*: each says whether it wishes to stop and whether it has failed. One that fails comes to
that meeting with its failure, so the others end with a sentence instead of waiting for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

__all__ = ["ProcessError", "Processes", "check_launch"]

T = TypeVar("T")


class ProcessError(RuntimeError):
    """Another process of the run has failed, ended, or does not answer."""


class Processes:
    """The processes of a run, on accelerate's devices; a single one never communicates.

    Args:
        accelerator: Has this process's number and device, and the collectives.
        timeout: Seconds it was told to wait for the others; for messages.
    """

    def __init__(self, accelerator: Accelerator, timeout: float = 1800.0) -> None:
        self.accelerator = accelerator
        self.timeout = timeout
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.main: bool = accelerator.is_main_process
        self._lost = False

    @staticmethod
    def start(timeout: float) -> Processes:
        """Join the processes that the launcher started; see `check_launch` for what is refused."""
        check_launch(os.environ)
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
        # Without an accelerator it has to be told so, or each of several processes believes it is alone.
        accelerator = Accelerator(cpu=None if torch.accelerator.is_available() else True, kwargs_handlers=[group])
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise ValueError(
                f"The launcher says that there are {launched} processes (WORLD_SIZE), and accelerate knows of "
                f"{accelerator.num_processes}. Launch with torchrun --nproc_per_node {launched} train.py CONFIG; on the CPUs of a "
                "machine with GPUs, with ACCELERATE_USE_CPU=true."
            )
        return Processes(accelerator, timeout)

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's of the items; as many as the others have where their number divides."""
        return list(items[self.index :: self.count])

    def agree(self, wish: bool = False) -> bool:
        """Whether any process wishes something; all get the same answer.

        Raises:
            ProcessError: one has failed or ended.
        """
        if self.count == 1:
            return wish
        met = self._meet(wish, failed=False)
        failed = met[:, 1].nonzero().flatten().tolist()
        if failed:
            raise ProcessError(
                f"Process {failed[0]} of {self.count} has failed; its own message says why. This is process {self.index}: "
                "nothing of the unfinished iteration is kept."
            )
        return bool(met[:, 0].any())

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Rows of all processes, joined in the order of their numbers; each has as many as the others. See `agree` for errors."""
        if self.count == 1:
            return list(tensors)
        self.agree()
        return [self._everywhere(self.accelerator.gather, tensor) for tensor in tensors]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes; they travel as one. See `agree` for errors."""
        if self.count == 1 or not tensors:
            return list(tensors)
        self.agree()
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        mean = self._everywhere(partial(self.accelerator.reduce, reduction="mean"), flat)
        parts = mean.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def leave(self) -> None:
        """Take leave of the others at the end of a program; nobody is asked or told anything afterwards.

        A process that ended without it was now and then aborted by the threads of its process group ("terminate called"), after
        its work was done.
        """
        if self.count > 1 and not self._lost:
            self._lost = True
            torch.distributed.destroy_process_group()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error in the block is told to the others at their next meeting."""
        try:
            yield
        except ProcessError:
            raise
        except Exception:
            if self.count > 1 and not self._lost:
                with suppress(Exception):
                    self._meet(wish=False, failed=True)
                self._lost = True  # the others leave: there is nobody to tell it once more
            raise

    def _meet(self, wish: bool, failed: bool) -> Tensor:
        mine = torch.tensor([[wish, failed]], dtype=torch.float32, device=self.accelerator.device)
        return self._together(partial(self.accelerator.gather, mine))

    def _everywhere(self, collective: Callable[[Tensor], Any], tensor: Tensor) -> Tensor:
        """What a collective makes of a tensor, from wherever it is and back: those of GPUs take none on the host."""
        there = tensor.to(self.accelerator.device)
        result: Tensor = self._together(lambda: collective(there))
        return result.to(tensor.device)

    def _together(self, collective: Callable[[], Any]) -> Any:
        try:
            return collective()
        except RuntimeError as error:
            self._lost = True
            raise ProcessError(
                f"Process {self.index} of {self.count} has lost the others: one has ended, or did not answer for "
                f"train.process_timeout {self.timeout:g} seconds. If one ended, its own message says why. ({error})"
            ) from error


IGNORED = {
    "ACCELERATE_MIXED_PRECISION": (
        {"no", ""},
        "accelerate's mixed precision {0!r} would be without effect: networks run in the dtype of their prior. Launch with "
        "--mixed_precision no, and set prior.dtype",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        {"1", ""},
        "accelerate's gradient accumulation over {0} steps would be without effect: every iteration accumulates its whole batch in "
        "micro-batches. Launch with --gradient_accumulation_steps 1, and set train.micro_batch",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (
        {"no", ""},
        "accelerate's dynamo backend {0!r} would be without effect: pipelines run as they are loaded. Launch without it",
    ),
    **{
        f"ACCELERATE_USE_{key}": (
            {"false", "0", "no", ""},
            f"{name} ({{0!r}} in ACCELERATE_USE_{key}) cannot be used: every process holds the whole network. Launch without it, "
            "e.g. torchrun --nproc_per_node 2",
        )
        for key, name in {
            "FSDP": "FSDP",
            "DEEPSPEED": "DeepSpeed",
            "MEGATRON_LM": "Megatron-LM",
            "PARALLELISM_CONFIG": "accelerate's parallelism",
        }.items()
    },
}
"""What `accelerate launch` hands over: variable -> values that ask for nothing, and why others are refused."""

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""One of these is set in every process of several."""


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse settings of `accelerate launch` that nothing here would follow; the ValueError says what to set instead."""
    for variable, (nothing, message) in IGNORED.items():
        value = environment.get(variable, "")
        if value.lower() not in nothing:
            raise ValueError(f"{message.format(value)}.")
    launched = "ACCELERATE_DYNAMO_BACKEND" in environment
    if launched and "MASTER_PORT" in environment and not any(rank in environment for rank in RANKS):
        raise ValueError(
            "accelerate launch was asked for several processes (it set MASTER_PORT) and has started one, which is what it does on "
            "CPUs. Launch with torchrun --nproc_per_node 2 train.py CONFIG; for one process, leave --num_processes out."
        )
