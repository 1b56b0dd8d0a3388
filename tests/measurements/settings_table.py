"""What each setting in `speed` changes, and what gradient checkpointing saves: the table of docs/memory.md.

python -m tests.measurements.settings_table [DEVICE]
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from diffusion_rtb.chain.rollout import rollout
from diffusion_rtb.doctor.activations import activation_bytes
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.metrics import parity
from diffusion_rtb.training.rounding_floor import rounding_floor
from diffusion_rtb.training.updates.gradient import push_back
from pipelines._models.memory import Memory
from pipelines._models.speed import Speed
from pipelines.stable_diffusion import StableDiffusion

PROMPTS = ["a cat emoji", "a rocket emoji", "a pizza emoji", "a red heart emoji"]
STEPS = 10
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "none": ({}, False),
    "channels_last": ({"channels_last": True}, False),
    "attention: math": ({"attention": "math"}, False),
    "attention: flash": ({"attention": "flash"}, False),
    "attention: efficient": ({"attention": "efficient"}, True),
    "attention: cudnn": ({"attention": "cudnn"}, True),
    "tf32: true": ({"tf32": True}, True),
    "compile: inductor": ({"compile": "inductor"}, False),
}
"""And whether it is for CUDA alone."""


def measured(speed: dict[str, Any], device: str) -> tuple[float, float, torch.Tensor]:
    """Parity of the gradient pass, the floor, both in nats, and the samples."""
    prior = StableDiffusion("emoji", steps=STEPS, guidance=2.0, device=device, speed=Speed(**speed))
    prior.attach(seed=0)
    sampler = Sampler(prior, lambda images, prompts: torch.zeros(len(images)), PROMPTS, len(PROMPTS))
    trajectory = rollout(prior, PROMPTS, range(len(PROMPTS))).to("cpu")
    own = Batch(trajectory, torch.arange(len(PROMPTS)), torch.zeros(len(PROMPTS)))
    cotangent = torch.ones_like(trajectory.log_prob).to(prior.device)
    replayed = push_back(sampler, [own], cotangent)[0]
    return parity(trajectory.log_prob, replayed), rounding_floor(sampler, own), trajectory.x_0


def activations(device: str) -> list[str]:
    """MiB that the gradient of one step of two trajectories takes, without and with gradient checkpointing."""
    found = []
    for checkpointing in (False, True):
        memory = Memory(gradient_checkpointing=checkpointing)
        prior = StableDiffusion("emoji", steps=2, device=device, memory=memory)
        prior.attach(seed=0)
        sampler = Sampler(prior, lambda images, prompts: torch.zeros(len(images)), PROMPTS, 2)
        found.append(f"{activation_bytes(sampler, sampler.draw([0, 1], [0, 1]), 2) / 2**20:.1f}")
    return found


def main(device: str = "cpu") -> None:
    """Write the table as Markdown."""
    logging.disable(logging.WARNING)
    sys.stdout.write(
        "Activations, MiB, without and with gradient_checkpointing: {}, {}\n\n".format(*activations(device))
    )
    sys.stdout.write(
        f"| setting, on {device} | parity, nats | rounding floor, nats | largest change of x_0 |\n|---|---|---|---|\n"
    )
    cuda, expected = torch.device(device).type == "cuda", torch.zeros(())
    switches = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name, (speed, for_cuda) in SETTINGS.items():
        if for_cuda and not cuda:
            sys.stdout.write(f"| {name} | not measured | not measured | not measured |\n")
            continue
        found, floor, x_0 = measured(speed, device)
        expected = x_0 if name == "none" else expected
        sys.stdout.write(f"| {name} | {found:.2g} | {floor:.2g} | {float((x_0 - expected).abs().max()):.2g} |\n")
        sys.stdout.flush()
        torch.set_float32_matmul_precision(switches[0])
        torch.backends.cudnn.allow_tf32 = switches[1]
        for switch in ("flash", "mem_efficient", "cudnn", "math"):
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
