"""Expected gradients of all objectives against that of alpha·KL(q || p) - E_q[r]: `python -m tests.measurements.objective_table`.

The chain of `tests/oracles/affine_policy.py`, a quadratic reward, trajectories of q itself or of a chain elsewhere and 15 % wider.
Two numbers each, relative to the exact gradient: the share of it that is there, and the length of what is not along it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from diffusion_rtb.objectives.ddpo import DDPO
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.reinforce_naive import ReinforceNaive
from diffusion_rtb.objectives.rtb import RTB
from tests.oracles.affine_policy import Answer, Estimate, example, expected_gradient

BETA = 1.7
LEVEL = 1.96


def dpok(kl: str) -> DPOK:
    torch.manual_seed(0)
    objective = DPOK(kl)  # type: ignore[arg-type]
    objective.prepare(1, (1,), 1)
    return objective.double()


# What is multiplied to get reward units, in which the exact gradient is: RTB's is that of the KL to the posterior, in nats.
ROWS: list[tuple[str, Answer, float, bool]] = [
    ("`rtb`", RTB(), 1 / BETA, False),
    ("`reinforce_kl`, `baseline: mean`", ReinforceKL("mean"), 1, False),
    ("`reinforce_kl`", ReinforceKL(), 1, False),
    ("`dpok`", dpok("gaussian_loss"), 1, False),
    ("`dpok`, `kl: gaussian`", dpok("gaussian"), 1, False),
    ("`grpo`, `normalise: none`", GRPO(normalise="none"), 1, False),
    ("`grpo`, `normalise: none`, `kl: gaussian`", GRPO("gaussian", normalise="none"), 1, False),
    ("`grpo`, `normalise: none`, `kl: k3_loss`", GRPO("k3_loss", normalise="none"), 1, False),
    ("`grpo`", GRPO(), 1, False),
    ("`ddpo`", DDPO(), 1, False),
    ("`reinforce_naive`", ReinforceNaive(), 1, False),
    ("`reinforce_kl`, `importance: exact`", ReinforceKL(importance="exact"), 1, True),
    ("`reinforce_kl`, `importance: self_normalised`", ReinforceKL(importance="self_normalised"), 1, True),
    ("`reinforce_kl`, `importance: tempered`", ReinforceKL(importance="tempered"), 1, True),
    ("`reinforce_kl`, no weights", ReinforceKL(), 1, True),
]


@dataclass
class Share:
    """Of the exact gradient: how much is there, and how much else."""

    along: float
    along_error: float
    across: float
    across_noise: float
    """The length that noise alone would have."""

    def __str__(self) -> str:
        return f"{self.along:.2f} ± {self.along_error:.2f}, {self.across:.2f} (noise {self.across_noise:.2f})"


def share(objective: Answer, factor: float, group: int, *, off_policy: bool, trajectories: int = 256_000) -> Share:
    """Of groups of one size."""
    policy = example()
    exact = policy.gradient(lambda theta: policy.kl(theta) / BETA - policy.expected_reward(theta))
    elsewhere = (policy.theta + torch.tensor([0.05, -0.1], dtype=torch.float64), 1.15)
    found: Estimate = expected_gradient(
        policy,
        objective,
        beta=BETA,
        group=group,
        groups=1600 // group,
        batches=trajectories // 1600,
        behaviour=elsewhere if off_policy else None,
    )
    mean, error, size = factor * found.mean, factor * found.error, float(exact.norm())
    along = float((mean * exact).sum()) / size**2
    # The six parameters' errors taken as independent: an approximation, for the table alone.
    spread = float((error * exact).square().sum().sqrt()) / size**2
    return Share(along, LEVEL * spread, float((mean - along * exact).norm()) / size, float(error.norm()) / size)


def table() -> str:
    """Markdown."""
    lines = ["| objective | trajectories of | groups of 8 | groups of 64 |", "|---|---|---|---|"]
    for name, objective, factor, off_policy in ROWS:
        few, many = (share(objective, factor, group, off_policy=off_policy) for group in (8, 64))
        lines.append(f"| {name} | {'another chain' if off_policy else 'q'} | {few} | {many} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
