"""Two processes on gloo: their averaged gradient is the one a single process gets from both their prompts."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusion_rtb.assemble import assemble
from tests.test_trainer import run_config
from tests.tiny import save_tiny


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gradient(prior: Path, out: Path, rank: int, world: int, port: int) -> None:
    """One iteration; the gradients that reach the optimizer go to a file per rank."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    sizes = {"grad_clip": 1e9, "gradient_steps": None, "prompts_per_iteration": 2, "micro_batch": 4}
    config = run_config(prior, out, objective={"component": "rtb", "log_z": "vargrad"}, train=sizes)
    trainer = assemble(config)
    assert trainer.accelerator.num_processes == world
    with torch.no_grad():  # off the prior, so that every adapter has a gradient
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.prior.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.step()
    grads = [p.grad.flatten() for p in trainer.prior.parameters().values() if p.grad is not None]
    save_file({"gradient": torch.cat(grads)}, out / f"gradient-{world}-{rank}.safetensors")


def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    prior = save_tiny(tmp_path / "prior")
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pair = [context.Process(target=gradient, args=(prior, tmp_path, rank, 2, port)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(180)
        assert process.exitcode == 0
    (tmp_path / "alone").mkdir()
    gradient(prior, tmp_path / "alone", 0, 1, 0)
    one = load_file(tmp_path / "alone" / "gradient-1-0.safetensors")["gradient"]
    for rank in (0, 1):
        two = load_file(tmp_path / f"gradient-2-{rank}.safetensors")["gradient"]
        # fp32 sums in another order and micro-batch; a missing average would be off by a factor or by the other's prompt.
        assert float((one - two).norm() / one.norm()) < 1e-4
