"""8-bit AdamW: near AdamW, saved and resumed to the last bit, and refused by name where its package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion_rtb.config.sections import TrainConfig
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.run.process_state import pack_optimizer, unpack_optimizer
from diffusion_rtb.training.updates.optimizer import adam
from tests.oracles.behaving import run

EIGHT = TrainConfig(optimizer="adamw8bit", lr=0.01)
here = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra bnb is not installed")


def descended(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
        optimizer.step()


@here
def test_it_goes_on_to_the_last_bit() -> None:
    """6,000 numbers, so that the moments are in 8 bits; the state goes through what a checkpoint holds."""
    whole, first, again = (nn.Parameter(torch.zeros(60, 100)) for _ in range(3))
    objective = RTB()
    descended(whole, adam([whole], objective, EIGHT), range(6))
    optimizer = adam([first], objective, EIGHT)
    descended(first, optimizer, range(3))
    tensors, values = pack_optimizer(optimizer.state_dict())
    assert {t.dtype for name, t in tensors.items() if name.endswith(("state1", "state2"))} == {torch.uint8}
    again.data.copy_(first.data)
    other = adam([again], objective, EIGHT)
    other.load_state_dict(unpack_optimizer({name: t.clone() for name, t in tensors.items()}, values))
    descended(again, other, range(3, 6))
    assert torch.equal(again, whole)
    plain = nn.Parameter(torch.zeros(60, 100))
    descended(plain, adam([plain], objective, EIGHT.model_copy(update={"optimizer": "adamw"})), range(6))
    assert not torch.equal(plain, whole)
    assert_close(whole, plain, rtol=0, atol=0.1 * float(plain.detach().abs().max()))


@here
def test_a_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    train = {"optimizer": "adamw8bit", "iterations": 4}
    whole = run(tmp_path / "whole", train=train)
    whole.fit()
    run(tmp_path, train=train | {"iterations": 2}).fit()
    again = run(tmp_path, train=train)
    again.fit()
    assert again.iteration == 4
    for name, parameter in again.prior.parameters().items():
        assert torch.equal(parameter, whole.prior.parameters()[name])


def test_without_the_package_it_is_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match=r"'adamw8bit'.*pip install 'diffusion-rtb\[bnb\]'"):
        run(tmp_path, train={"optimizer": "adamw8bit"})
    assert not (tmp_path / "known").exists()
