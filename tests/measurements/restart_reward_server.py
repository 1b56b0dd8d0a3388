"""A training run whose reward server is killed and comes back, and one whose server stays away; a command, not a test.

    python -m tests.measurements.restart_reward_server [--iterations 12] [--kills 2]

Trains a tiny pipeline with `remote` while the server's process is killed (SIGKILL) and started again a second later, and compares
every logged number with those of the same run with the reward at home. Then the same with a server that is killed for good: the
command `train` must stop, name the server, and leave a checkpoint; with a new server the same command goes on from there.
Printed as one line of JSON; leaves with 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diffusion_rtb.run.checkpoint import latest_checkpoint
from tests.measurements.load_reward_server import COMPONENT, Restarting, kill
from tests.oracles.serving import ROOT, await_health, free_port, start_process
from tests.oracles.tiny import save_tiny

CONFIG = """
name: {name}
out: {out}
prior: {{component: stable_diffusion, path: {prior}, steps: 2, device: cpu}}
reward: {reward}
beta: 0.5
posterior: {{rank: 1, alpha: 1.0}}
prompts: {{list: [a cat, a dog]}}
train: {{iterations: {iterations}, prompts_per_iteration: 2, group: 2, micro_batch: 4, grid_every: 0}}
"""


def config(folder: Path, name: str, reward: dict[str, Any], iterations: int) -> Path:
    path = folder / f"{name}.yaml"
    fields = {"name": name, "out": folder, "prior": folder / "prior", "iterations": iterations}
    path.write_text(CONFIG.format(**fields, reward=json.dumps(reward)))
    return path


def train(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Every logged number but times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def lines(folder: Path) -> int:
    """Iterations that a run has logged."""
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def remote(port: int, **waits: float) -> dict[str, Any]:
    return {"component": "remote", "servers": f"http://127.0.0.1:{port}", **waits}


def through_restarts(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Killed and restarted while a run asks."""
    port = free_port()
    path = config(folder, "restarts", remote(port, retries=40, backoff=0.2, max_backoff=2.0), given.iterations)
    due = [number * given.iterations // (given.kills + 1) for number in range(1, given.kills + 1)]
    with Restarting(port, given.kills, lambda number: lines(folder / "restarts") >= due[number - 1]) as server:
        start = time.monotonic()
        code = train(path).wait()
        wall = time.monotonic() - start
        killed = server.killed
    return {"code": code, "killed": killed, "wall_s": round(wall, 1), "numbers": numbers(folder / "restarts")}


def for_good(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Killed after some iterations, away until the run has stopped, then there again."""
    port = free_port()
    path = config(folder, "stopped", remote(port, retries=3, backoff=0.1), given.iterations)
    server = start_process(COMPONENT, port)
    await_health(port, 600)
    running = train(path)
    while running.poll() is None and lines(folder / "stopped") < given.iterations // 3:
        time.sleep(0.005)
    kill(server)
    told = running.communicate()[1]
    latest, stopped_at = latest_checkpoint(folder / "stopped" / "checkpoints"), lines(folder / "stopped")
    server = start_process(COMPONENT, port)
    try:
        await_health(port, 600)
        again = train(path).wait()
    finally:
        kill(server)
    return {
        "code": running.returncode, "said": " ".join(told.split())[-400:], "checkpoint": latest.name if latest else None,
        "iterations_done": stopped_at, "code_again": again, "numbers": numbers(folder / "stopped"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Training through restarts of the reward server.")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--kills", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny(folder / "prior")
        assert train(config(folder, "home", COMPONENT, given.iterations)).wait() == 0
        home = numbers(folder / "home")
        restarts, stopped = through_restarts(folder, given), for_good(folder, given)
    for found in (restarts, stopped):
        found["same_numbers_as_at_home"] = found.pop("numbers") == home
    sys.stdout.write(json.dumps({"restarts": restarts, "for_good": stopped}) + "\n")
    went_on = restarts["code"] == 0 and restarts["same_numbers_as_at_home"] and restarts["killed"] > 0
    stopped_well = stopped["code"] != 0 and stopped["checkpoint"] and stopped["code_again"] == 0
    sys.exit(0 if went_on and stopped_well and stopped["same_numbers_as_at_home"] else 1)


if __name__ == "__main__":
    main()
