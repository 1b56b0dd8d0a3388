"""The matrix rate of the machine: what share of it a model reaches is counted against."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_rtb.benchmark.device import TORCH_DTYPES, timed, typical

__all__ = ["measure_rate"]

SIDES = {"cuda": 8192, "cpu": 512}
"""Of the square matrices: large enough to fill the device."""


def measure_rate(dtype: str, device: torch.device) -> dict[str, Any]:
    """FLOP/s of A·B with random numbers, 2n³ of them for n x n matrices; median of several runs after a warm-up."""
    side = SIDES.get(device.type, 512)
    a, b = (torch.randn(side, side, device=device, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    timed(product, device, most=3)
    seconds = timed(product, device, seconds=1.0, most=30)
    return {
        "side": side,
        "runs": len(seconds),
        "seconds": typical(seconds),
        "flop_per_second": 2 * side**3 / typical(seconds),
    }
