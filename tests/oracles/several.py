"""Several processes of one run on gloo, as a launcher starts them, from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["ended", "free_port", "importing_server", "started"]

PRELOADED = [
    # A process imports the module of the function that it runs: with diffusers, 5 seconds for each.
    "tests.training.test_distributed",
    "tests.oracles.behaving",
    "pipelines.gaussian",
    "rewards.density",
    "rewards.standardise",
    "diffusion_rtb.objectives.rtb",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def importing_server() -> ForkServerContext:
    """Starts processes that have imported `PRELOADED`; there is one server for all tests of a worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def started(count: int, work: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """`work(rank, *arguments)` in each of `count` processes that know of each other."""
    context, port = importing_server(), free_port()
    found = [context.Process(target=_joined, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for process in found:
        process.start()
    return list(found)


def ended(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit codes, once all have ended; those that have not by then are killed, and have None."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def _joined(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    work(rank, *arguments)
