"""Optimizers and random generators go on with the same numbers after a checkpoint, without pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.run.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rtb.run.process_state import pack_optimizer, rng_state, set_rng_state, unpack_optimizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.1, "betas": (0.8, 0.9)}, {"params": p[1:], "weight_decay": 0.3}],
        lr=0.01,
        amsgrad=True,
    ),
    "adam with a tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.03), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "named": lambda p: torch.optim.AdamW([("a", p[0]), ("b", p[1])], lr=0.1),
}


def descend(parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**2 * torch.randn_like(p)).sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    parameters: list[Tensor] = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = OPTIMIZERS[name](parameters)
    descend(parameters, optimizer, 3)
    tensors, tree = pack_optimizer(optimizer.state_dict())
    values = {str(i): p for i, p in enumerate(parameters)}
    path = save_checkpoint(tmp_path, 3, {"optimizer": tensors, "values": values, "rng": rng_state()}, {"tree": tree}, 1)
    descend(parameters, optimizer, 3)

    loaded, state = load_checkpoint(path)
    resumed: list[Tensor] = [torch.nn.Parameter(loaded["values"][name]) for name in values]
    fresh = OPTIMIZERS[name](resumed)
    restored = unpack_optimizer(loaded["optimizer"], state["tree"])
    fresh.load_state_dict(restored)
    set_rng_state(loaded["rng"])
    descend(resumed, fresh, 3)

    for found, expected in zip(resumed, parameters, strict=True):
        assert torch.equal(found, expected)
    for group in restored["param_groups"]:
        assert "betas" not in group or isinstance(group["betas"], tuple)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        JSON,
        lambda inner: (
            st.tuples(inner, inner)
            | st.dictionaries(st.integers() | st.sampled_from(["@tensor", "@items", "@"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_packing_keeps_tuples_integer_keys_and_its_own_marks(value: Any) -> None:
    tensors, tree = pack_optimizer({"state": value})
    back = unpack_optimizer(tensors, json.loads(json.dumps(tree)))
    assert repr(back) == repr({"state": value})  # repr tells tuples from lists and 1 from True


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(TypeError, match=r"a set at 'state\.0\.seen'"):
        pack_optimizer({"state": {0: {"seen": {1, 2}}}})


def test_generators_go_on_with_the_same_numbers(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        legacy = [np.random.normal(), np.random.randint(1 << 30)]
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), *legacy

    draw()  # an odd number of normal draws: the second of the pair waits inside the generators
    state = rng_state()
    expected = [
        draw() for _ in range(3)
    ]  # before any other call: beartype draws from Python's generator to check lists
    path = save_checkpoint(tmp_path, 0, {"rng": state}, {}, keep=1)
    set_rng_state(load_checkpoint(path)[0]["rng"])
    assert [draw() for _ in range(3)] == expected


def test_a_generator_that_is_not_here_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    set_rng_state({**rng_state(), "abacus": torch.zeros(3, dtype=torch.uint8)})
    assert "'abacus' is not restored" in caplog.text
