"""Muon for matrices and convolutions, AdamW for everything else, as one optimiser.

Muon (Jordan et al., 2024) takes the momentum G of a weight matrix and steps along its nearest semi-orthogonal matrix, U V^T of
G = U S V^T, found by a Newton-Schulz iteration. The update is scaled to the size of an AdamW update (Liu et al., 2025), so
that both share one learning rate. On few steps, as here, it learns clearly faster per step than AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Parameters with at least `smallest` rows and columns (convolutions: out x in*k*k) take Muon steps, others AdamW."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, smallest: int = 16, largest: int = 4096
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in parameters:
            rows, columns = len(p) if p.ndim else 0, p[0].numel() if p.ndim > 1 else 0
            (matrices if smallest <= min(rows, columns) and max(rows, columns) <= largest else others).append(p)
        super().__init__(
            [{"params": matrices, "muon": True}, {"params": others, "muon": False}],
            {"lr": lr, "momentum": 0.95, "betas": (0.9, 0.99), "weight_decay": 0.01},
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update(p, p.grad, group)

    def _muon(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(momentum, group["momentum"]).flatten(1)
        scale = 0.2 * math.sqrt(max(matrix.shape))
        p.sub_(group["lr"] * scale * orthogonal(matrix).view(p.shape))

    def _adam(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        steps = float(state["step"])
        mean = state["mean"].lerp_(gradient, 1 - b1)
        square = state["square"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        scale = math.sqrt(1 - b2**steps) / (1 - b1**steps)
        p.addcdiv_(mean, square.sqrt().add_(1e-8), value=-float(group["lr"]) * scale)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of U S V^T, singular values in 0.7..1.2, by five quintic Newton-Schulz steps in bfloat16."""
    x = matrix.bfloat16()
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)
