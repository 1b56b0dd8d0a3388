"""The pretended device itself: the CPU's numbers, errors where CUDA has them, and every wait with its line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.pretended_device import DEVICE, counted


def there(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def test_numbers_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.LayerNorm(4))
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.LayerNorm(4)).to(DEVICE)
    x = torch.randn(5, 3)
    for network, states in ((here, x), (other, x.to(DEVICE))):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        network(states).square().mean().backward()
        optimizer.step()
    for a, b in zip(here.parameters(), other.parameters(), strict=True):
        assert b.device == torch.device(DEVICE)
        torch.testing.assert_close(a, b.cpu())  # other kernels: last bits differ
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.cpu())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: there(1.0, 2.0) + torch.ones(2),
        lambda: torch.ones(2)[torch.tensor([0], device=DEVICE)],
        lambda: torch.cat([there(1.0), torch.ones(1)]),
        lambda: there(1.0).numpy(),
        lambda: torch.randn(2, generator=torch.Generator(), device=DEVICE),
        lambda: torch.nn.Linear(1, 1)(there(1.0)),
    ],
)
def test_what_cuda_refuses_is_refused(mixed: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        mixed()


def test_a_number_of_the_host_mixes() -> None:
    assert (there(1.0, 2.0) * torch.tensor(3.0)).tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    "waiting",
    [
        lambda t: float(t[0]),
        lambda t: bool(t[0] > 0),
        lambda t: t[0].item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: torch.zeros(2).copy_(t),
        lambda t: torch.equal(t, t.clone()),
        lambda t: torch.allclose(t, t.clone()),
        lambda t: t.nonzero(),
        lambda t: t[t > 1],
        lambda t: t.unique(),
        lambda t: f"{t[0]:g}",
        lambda t: [0, 1, 2][t[0].long()],
    ],
)
def test_what_the_host_waits_for_is_counted_with_its_line(waiting: Callable[[Tensor], Any]) -> None:
    t = there(1.0, 2.0)
    with counted() as counts:
        waiting(t)
    assert sum(counts.waits.values()) == 1
    assert next(iter(counts.waits)).startswith("tests/devices/on_it/device.py:")
    assert not counts.sends


def test_what_stays_on_the_device_waits_for_nothing() -> None:
    t = there(1.0, 2.0)
    with counted() as counts:
        _ = torch.stack([t.sum(), t[0] / t[1], t.isfinite().all()]).clone().to(DEVICE).double()
        t[0] = 3.0
        t[1:].mul_(2)
        torch.arange(3, device=DEVICE), torch.zeros_like(t), torch.full((2,), 1.5, device=DEVICE)
    assert not counts.waits
    assert not counts.sends
    assert t.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "sent", [lambda: torch.ones(2).to(DEVICE), lambda: torch.tensor([1.0], device=DEVICE), lambda: there(1.0)]
)
def test_what_is_copied_to_it_is_counted(sent: Callable[[], Tensor]) -> None:
    with counted() as counts:
        sent()
    assert sum(counts.sends.values()) == 1
    assert not counts.waits


def test_where_nobody_counts_nothing_is_kept() -> None:
    with counted() as counts:
        pass
    there(1.0).tolist()
    assert not counts.waits
