"""Load test of the reward server on loopback; a command, not a test.

    python -m tests.measurements.load_reward_server [--kills 2] [--clients 2] [--requests 200] [--images 8] [--size
    64] [--encoding NAME]

Client processes score batches with `remote` as a run does, one after the other, and compare every number with the same reward
computed at home. With --kills the server is killed (SIGKILL) that many times, at even distances between the first request and
the last, and started again a second later. Printed as one line of JSON: what was sent, answered, wrong and lost, and the
milliseconds per request as the client sees them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from diffusion_rtb.remote_reward.messages import ENCODINGS, Encoding
from rewards.jpeg import Jpeg
from rewards.remote import Remote
from tests.oracles.serving import await_health, free_port, start_process

COMPONENT: dict[str, Any] = {"component": "jpeg", "quality": 80}


@dataclass(frozen=True)
class Load:
    """How much is asked, by how many."""

    clients: int = 2
    requests: int = 200
    images: int = 8
    size: int = 64
    encoding: Encoding = "safetensors"
    kills: int = 0


@dataclass(frozen=True)
class Seen:
    """What one client saw."""

    seconds: list[float]
    """Per request: the call of `remote`."""
    local_seconds: list[float]
    """Per request: the same reward at home."""
    wrong: int
    """Rewards that differ from those computed at home."""


def client(port: int, load: Load, seed: int, done: Path) -> Seen:
    """Score the client's batches, with a byte in `done` for each; an exception is a lost request and ends the client."""
    torch.set_num_threads(1)
    reward = Remote(f"http://127.0.0.1:{port}", encoding=load.encoding, retries=40, backoff=0.2, max_backoff=4.0)
    home = Jpeg(quality=COMPONENT["quality"])
    generator = torch.Generator().manual_seed(seed)
    seconds, local_seconds, wrong = [], [], 0
    for i in range(load.requests):
        images = torch.rand(load.images, 3, load.size, load.size, generator=generator)
        prompts = [f"request {i}, image {k}" for k in range(load.images)]
        start = time.perf_counter()
        values = reward(images, prompts)
        middle = time.perf_counter()
        expected = home(images, prompts)
        seconds.append(middle - start)
        local_seconds.append(time.perf_counter() - middle)
        wrong += int((values != expected).sum())
        with done.open("ab") as file:
            file.write(b".")
    return Seen(seconds, local_seconds, wrong)


class Restarting:
    """A server that is killed `kills` times, the k-th time as soon as `due(k)` is true, and comes back a second later."""

    def __init__(self, port: int, kills: int, due: Callable[[int], bool]) -> None:
        self.port, self.kills, self.due = port, kills, due
        self.killed = 0
        self._stop = threading.Event()
        self._server = start_process(COMPONENT, port)
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Restarting:
        try:
            await_health(self.port, seconds=600)
        except BaseException:
            kill(self._server)
            raise
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        kill(self._server)

    def _work(self) -> None:
        while self.killed < self.kills and not self._stop.wait(0.005):
            if self.due(self.killed + 1):
                kill(self._server)
                self.killed += 1
                self._stop.wait(1.0)
                self._server = start_process(COMPONENT, self.port)


def kill(server: subprocess.Popen[bytes]) -> None:
    """As the kernel does when memory runs out."""
    server.send_signal(signal.SIGKILL)
    server.wait()


def run(load: Load, executor: Executor, folder: Path) -> dict[str, Any]:
    """The report: counts, and milliseconds per request; clients write into `folder`."""
    port = free_port()
    logs = [folder / str(seed) for seed in range(load.clients)]
    for log in logs:
        log.touch()

    def due(number: int) -> bool:
        return sum(log.stat().st_size for log in logs) >= number * load.clients * load.requests / (load.kills + 1)

    with Restarting(port, load.kills, due) as server:
        start = time.perf_counter()
        futures = [executor.submit(client, port, load, seed, log) for seed, log in enumerate(logs)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        seen = [future.result() for future in futures if future.exception() is None]
        wall = time.perf_counter() - start
    times = 1000 * np.array([value for one in seen for value in one.seconds])
    local = 1000 * np.array([value for one in seen for value in one.local_seconds])
    sent, answered = load.clients * load.requests, len(times)
    shares = {f"p{p}_ms": round(float(np.percentile(times, p)), 2) for p in (50, 90, 99)} if answered else {}
    return vars(load) | {
        "requests_sent": sent,
        "requests_answered": answered,
        "requests_lost": sent - answered,
        "rewards_wrong": sum(one.wrong for one in seen),
        "server_killed": server.killed,
        **shares,
        "max_ms": round(float(times.max()), 2) if answered else None,
        "at_home_p50_ms": round(float(np.median(local)), 2) if answered else None,
        "wall_s": round(wall, 2),
        "errors": [str(error) for error in errors],
    }


def main() -> None:
    """Parse, run, print; exit code 1 where something was lost or wrong."""
    parser = argparse.ArgumentParser(description="Load test of the reward server on loopback.")
    for name in ("clients", "requests", "images", "size", "kills"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Load, name))
    parser.add_argument("--encoding", choices=ENCODINGS, default=Load.encoding)
    load = Load(**vars(parser.parse_args()))
    with ProcessPoolExecutor(load.clients, get_context("spawn")) as executor, TemporaryDirectory() as folder:
        report = run(load, executor, Path(folder))
    sys.stdout.write(json.dumps(report) + "\n")
    sys.exit(1 if report["requests_lost"] or report["rewards_wrong"] or report["server_killed"] < load.kills else 0)


if __name__ == "__main__":
    main()
