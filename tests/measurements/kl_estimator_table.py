"""Every placement of every KL estimator, measured against the exact gradient: `python -m tests.measurements.kl_estimator_table`.

The chain of `tests/oracles/affine_policy.py`: 3 steps, six parameters, KL(q || p) known with its gradient.
On-policy; the reward is left
out, so that the whole gradient is the KL's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._kl_estimators import KlEstimator, KlOption
from tests.oracles.affine_policy import AffinePolicy, Estimate, example

OPTIONS: list[KlOption] = [name for name in get_args(KlOption) if name != "none"]
LEVEL = 1.96
"""Standard errors of a 95 % interval."""


class KlAlone:
    """The KL as the only term of a policy gradient: mean of K·log_q, K detached, for the reward, plus K' for the loss."""

    def __init__(self, name: KlOption) -> None:
        self.kl = KlEstimator(name)

    def __call__(self, terms: Terms, beta: float) -> Loss:
        loss = torch.mean(self.kl.in_reward(terms) * terms.log_q.sum(1) + self.kl.in_loss(terms))
        zero = torch.zeros_like(terms.reward)
        return Loss(loss, zero, zero)


def parts(policy: AffinePolicy) -> dict[str, Tensor]:
    """The gradients that a placement may have as its expectation, exactly."""
    whole, local = policy.gradient(policy.kl), policy.gradient(policy.local_kl)
    forward = policy.gradient(policy.forward_kl)
    return {
        "grad KL(q‖p)": whole,
        "its local part": local,
        "its future part": whole - local,
        "0": torch.zeros_like(whole),
        "grad KL(p‖q)": forward,
        "grad [KL(q‖p) − KL(p‖q)]": whole - forward,
    }


EXPECTED: dict[KlOption, str | None] = {
    "k1_reward": "grad KL(q‖p)",
    "k1_loss": "0",
    "k2_reward": None,
    "k2_loss": "its local part",
    "k3_reward": "its future part",
    "k3_loss": "its local part",
    "gaussian": "grad KL(q‖p)",
    "gaussian_reward": "its future part",
    "gaussian_loss": "its local part",
    "path_k2_reward": None,
    "path_k2_loss": "grad KL(q‖p)",
    "path_k3_reward": "grad [KL(q‖p) − KL(p‖q)]",
    "path_k3_loss": "grad KL(p‖q)",
}


@dataclass
class Row:
    """What was measured of one placement."""

    name: KlOption
    share: float
    """Projection of the expected gradient on the exact one: 1 is right, 0 no regularisation, less than 0 the wrong way."""
    share_error: float
    bias: float
    """|expected − exact| / |exact|."""
    bias_error: float
    noise: float
    """Standard deviation of one trajectory's gradient / |exact|."""
    from_exact: float
    """Largest deviation of a parameter from the exact gradient, in standard errors."""
    from_expected: float | None
    """The same from what theory expects of this placement."""

    @property
    def biased(self) -> bool:
        """Beyond chance: 4.5 standard errors in one of six parameters come up by chance once in 25,000 times."""
        return self.from_exact > 4.5


def measure(name: KlOption, trajectories: int, seed: int = 0, chunk: int = 50_000) -> Row:
    """Mean and noise of the gradient of one placement over on-policy trajectories."""
    policy = example()
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for start in range(0, trajectories, chunk):
        terms = policy.terms(policy.sample(min(chunk, trajectories - start), generator))
        draws.append(policy.gradients(KlAlone(name), terms, 1.0))
    each = torch.cat(draws)
    exact, found = parts(policy), Estimate.of(each)
    truth = exact["grad KL(q‖p)"]
    size = float(truth.norm())
    off = found.mean - truth
    along, towards = (each * truth).sum((1, 2)) / size**2, (each * off).sum((1, 2)) / float(off.norm())
    error = len(each) ** -0.5
    theory = EXPECTED[name]
    return Row(
        name,
        float(along.mean()),
        LEVEL * float(along.std()) * error,
        float(off.norm()) / size,
        LEVEL * float(towards.std()) * error / size,
        float((each - found.mean).square().sum((1, 2)).mean().sqrt()) / size,
        found.distance(truth),
        None if theory is None else found.distance(exact[theory]),
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| `kl` | expected gradient | share of grad KL(q‖p), 95 % | bias, 95 % | noise | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "biased" if row.biased else "unbiased"
        lines.append(
            f"| `{row.name}` | {EXPECTED[row.name] or 'none of these'} | {row.share:.3f} ± {row.share_error:.3f} | "
            f"{row.bias:.3f} ± {row.bias_error:.3f} | {row.noise:.1f} | {verdict} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    count = parser.parse_args().trajectories
    sys.stdout.write(table([measure(name, count) for name in OPTIONS]) + "\n")
