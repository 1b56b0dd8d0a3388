"""What is on the device, and when: a micro-batch and not the batch, and one network at a time where that is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.config.components import build
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.updates.gradient import push_back
from tests.oracles import pretended_device
from tests.oracles.pretended_device import DEVICE, PretendedTensor
from tests.oracles.tiny import save_tiny

STATE = 4 * 8 * 8 * 4
"""Bytes of one."""


class Held:
    """Bytes of the tensors on the device, now and at most."""

    now = most = 0

    def add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


@contextmanager
def held() -> Iterator[Held]:
    found, make = Held(), PretendedTensor.__new__

    def new(cls: Any, tensor: Tensor) -> PretendedTensor:
        made = make(cls, tensor)
        size = tensor.numel() * tensor.element_size()
        found.add(size)
        weakref.finalize(made, found.add, -size)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretended_device.PretendedTensor, "__new__", staticmethod(new))
        yield found


def mean(images: Tensor, prompts: Any) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def sampler(folder: str, **settings: Any) -> Sampler:
    given = {"component": "stable_diffusion", "path": folder, "steps": 3, "device": DEVICE, "decode_batch": 2}
    prior = build(given | settings, "prior")
    prior.attach(rank=2, alpha=2.0)
    return Sampler(prior, mean, ["a cat", "a dog"], micro_batch=2)


def iterated(made: Sampler, count: int) -> list[Tensor]:
    """Gradients of `count` trajectories that were drawn, scored with their KL, and differentiated; no state of them is there."""
    batch = made.with_kl(made.draw([0] * count, range(count)))
    fields = [*batch.trajectory.tensors().values(), batch.prompt, batch.reward, batch.log_q, batch.log_p, batch.mean_p]
    assert {tensor.device.type for tensor in fields if tensor is not None} == {"cpu"}
    push_back(made, [batch], torch.ones(count, 3, device=DEVICE), torch.ones(count, 3, device=DEVICE))
    return [p.grad.detach().cpu() for p in made.prior.parameters().values() if p.grad is not None]


def test_the_device_holds_a_micro_batch_however_large_the_batch_is(folder: str) -> None:
    made = sampler(folder)
    iterated(made, 2)
    most = []
    for count in (2, 8):
        with held() as found:
            iterated(made, count)
        most.append(found.most)
    assert most[1] - most[0] < 6 * STATE / 2, "six more rows in tables of log-densities, and none of 6 x 4 states"


def test_so_does_a_prior_buffer_that_is_filled(folder: str) -> None:
    made, most = sampler(folder), []
    for capacity in (2, 8):
        source = PriorBuffer(share=0.5, capacity=capacity)
        source.prepare(0, 4)
        with held() as found:
            batches = source.everything(made)
        assert {len(batch) for batch in batches} == {capacity}
        most.append(found.most)
    assert most[1] - most[0] < 6 * STATE / 2


def on_device(network: nn.Module) -> bool:
    frozen = {p.device.type for p in network.parameters() if not p.requires_grad}
    assert len(frozen) == 1, "a network is somewhere as a whole"
    return frozen != {"cpu"}


def test_one_network_at_a_time_is_there_and_the_numbers_are_the_same(folder: str, tmp_path: Path) -> None:
    made = sampler(folder, memory={"offload": "all", "embeddings": str(tmp_path)})
    pipe = made.prior.pipe
    networks = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae": pipe.vae}
    seen: list[tuple[str, list[str]]] = []

    def look(name: str) -> Any:
        return lambda *_: seen.append((name, [other for other, network in networks.items() if on_device(network)]))

    for name, module in (("text_encoder", pipe.text_encoder), ("unet", pipe.unet), ("vae", pipe.vae.decoder)):
        module.register_forward_hook(look(name))
    gradients = iterated(made, 4)
    assert {name for name, _ in seen} == {"text_encoder", "unet", "vae"}
    assert all(there == [name] for name, there in seen)
    assert all(p.device.type != "cpu" for p in made.prior.parameters().values())
    for one, other in zip(gradients, iterated(sampler(folder), 4), strict=True):
        assert torch.equal(one, other)

    again = sampler(folder, memory={"offload": "all", "embeddings": str(tmp_path)})
    encoder = again.prior.pipe.text_encoder
    encoder.register_forward_pre_hook(lambda *_: pytest.fail("the embedding is kept"))
    iterated(again, 2)
    assert not on_device(encoder)


def test_text_encoders_leave_when_the_network_is_needed(folder: str) -> None:
    made = sampler(folder, memory={"offload": "text_encoders"})
    pipe, seen = made.prior.pipe, []
    pipe.text_encoder.register_forward_hook(lambda *_: seen.append(on_device(pipe.text_encoder)))
    pipe.unet.register_forward_hook(lambda *_: seen.append(on_device(pipe.text_encoder)))
    made.draw([0], [0])
    assert seen[0] is True
    assert set(seen[1:]) == {False}
    assert on_device(pipe.unet)
    assert on_device(pipe.vae)
