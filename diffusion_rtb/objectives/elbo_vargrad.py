r"""VarGrad on samples instead of trajectories: log q - log p of x_0 by a difference of weighted denoising errors.

    l = sum_t |mean_p - mean_0|² / (2·std_t²) - |mean_q - mean_0|² / (2·std_t²)      at noised states x_t of x_0, the same for both
    d = l - beta·r - mean of the prompt's samples,      loss = mean of d²/2

with mean_0 the mean by a network that knows x_0. Sums over dimensions and steps, weights 1/std²: with eta 1 each sum is the
negative lower bound (ELBO) of the chain's log-density of x_0, up to a constant, so that l estimates log q(x_0) - log p(x_0) in
nats. Any sampler may draw x_0. (CRD's loss takes means over D dimensions: beta is then felt D times as strong.)

**It is biased.** l has noise, from the noise of x_t and from steps that are left out, and the loss counts its variance: d²/2 on
average is half of (E[l] - beta·r - mean)² + Var(l | x_0). Var(l | x_0) is 0 where q is p and grows with |mean_q - mean_p|², so that
its part of the gradient leads back to the prior; the more so the more nats are asked for, and with few `gradient_steps`, whose l
has more noise. And the difference of two bounds is not that of the log-densities.
On `gmm25`, in small, it ends at E[r] -0.14 and a KL of 3.5, where the posterior has 1.16 and 1.16, and `rtb` on trajectories, whose
log-ratio has no noise at the optimum, 1.08 and 1.87 (README of this folder). The product of two d with independent noise would be
unbiased in l; the pull of each is then multiplied by the noise of the other, and it diverged in training.

`refresh` lets the reference follow, as in CRD: every n iterations it becomes the posterior, each round asks for beta·r more, and no
posterior is its end; a baseline, stopped early.

It calls the posterior once more than others do: what a sample's d is, from all of its steps and its whole group, has to be known
before the first of its states can be pulled. One call of each state would do only with the graphs of all steps of a micro-batch
kept at once, and with a second backward for the group's mean, which comes last: memory in proportion to the steps, and a backward
costs twice the call that it saves. What was drawn with does not help: its states are not the noised ones. And the d of the
iteration before is that of other samples.

Sources: CRD, 2026, https://arxiv.org/abs/2603.14128; VarGrad, Richter et al. 2020, https://arxiv.org/abs/2010.10436
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Samples, States
from diffusion_rtb.objectives._aiming import Aiming, checked, target
from diffusion_rtb.objectives._groups import group_baseline

__all__ = ["ElboVarGrad"]


class ElboVarGrad(Aiming):
    """Make l - beta·r the same for all samples of a prompt; see the module.

    Args:
        refresh: Iterations after which the reference becomes the posterior of the moment; None: it is the prior.

    Raises:
        ValueError: refresh is below 1.
    """

    reads_bounds = True

    def __init__(self, refresh: int | None = None) -> None:
        super().__init__()
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh is a number of iterations, at least 1, or null for the prior; got {refresh}.")
        self.refresh = refresh
        self.compares = ("prior",) if refresh is None else ("old",)

    def keeps_old(self, iteration: int) -> float:
        """1 within a round, 0 at its end."""
        return 1.0 if self.refresh is None or (iteration + 1) % self.refresh else 0.0

    def weights(self, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
        """d; nats."""
        assert samples.log_ratio is not None
        residual = samples.log_ratio - beta * checked("elbo_vargrad", samples, beta)
        return residual - group_baseline(residual, samples.prompt)

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """mean_q, pulled by the gradient of d²/2."""
        mean_0, residual = target(at)
        return at.mean_q + residual * (at.mean_q - mean_0)
