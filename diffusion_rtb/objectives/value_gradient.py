r"""The gradient of the soft value as the target of each transition's mean: no trajectories, no gradient of the reward.

    log F(x_t) = log E_p[ exp(beta·r(x_0)) | x_t ]                                  beta·V(x_t)
    p*(x_s | x_t) = p(x_s | x_t)·F(x_s) / F(x_t)                                    the posterior's own transition
    aim(x_t) = mean_p + scale·std²·E_{x_s ~ q(. | x_t)}[ grad log F(x_s) ]

There the residual of `trust_pcl` with length 1, log F(x_s) - log F(x_t) - log q + log p, has no slope in x_s on average: D numbers
of signal for each state, where the residual is one number under the noise of D. With scale 1 it is the normal nearest to p* in
KL(q || p*) (Stein's identity), and as steps become small p* is that normal. V is learned before the first iteration
(`_bounded_value.py`), from samples of the prior, noised anew each time.

Where samples come from the posterior itself (`prior_buffer` with `resample` and `noised`: samples of the prior, drawn by
exp(beta·r)), x_0 is one of those that x_t should lead to, and gives a target with more noise and without V's errors:

    aim(x_t) = mean_p + scale·(E[x_s | x_t, x_0] - mean_p)          with scale 1 and on average over x_0 the mean of p*(x_s | x_t)

Of a sampler without noise, an ODE, mean_p and std are those of its stochastic counterpart between the same noise levels
(`chain/reversal.py`); its own states will do as x_t.

`from_samples` is the share of steps, the noisiest first, that take it. There V is worst, a gradient learned from states that are
nearly all noise, and there a class or a colour is decided. With from_samples 1 it is weighted maximum likelihood.

Sources: the gradient of detailed balance, with that of the reward: Liu et al. 2025, https://arxiv.org/abs/2412.07775. Normal
transitions near the tilted ones: Wu et al. 2023, https://arxiv.org/abs/2306.17775. Guidance by classifiers of noised states:
Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233. Weighted denoising: Fan et al. 2025, https://arxiv.org/abs/2502.06061.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.interfaces import Loss, States, Terms, Walks
from diffusion_rtb.objectives._bounded_value import BoundedValue
from diffusion_rtb.objectives._checks import check_beta, check_positive
from diffusion_rtb.objectives._value_fit import Noise
from diffusion_rtb.objectives.rtb import RTB

__all__ = ["ValueGradient"]


class ValueGradient(nn.Module):
    """Regress the mean of each transition on the prior's, shifted along the gradient of the soft value; see the module.

    Args:
        warm_up_updates: Updates of V before the first iteration, on samples of the prior; 0 where nothing takes its gradient.
        width: Channels of V.
        blocks: Residual blocks of V: what is told apart in noised latents may take more than two or three convolutions.
        scale: Of the shift; with few steps 1.2 to 1.6 comes nearer, because what a step leaves undone costs the later ones more.
        draws: Next states that the gradient is averaged over.
        from_samples: Share of the steps, the noisiest first, where samples of the posterior are their own target.
        lr: Of V's warm-up.
        rounds: After it, how often V leads the prior and then learns from where that led, see `_chain_value.py`: with few steps the
            V of noised samples promises more than the chain keeps. Each costs `walks` trajectories a prompt and 2,000 updates.
        walks: Trajectories of each prompt in a round.

    Raises:
        ValueError: an argument is out of range, or nothing is left to learn V from.
    """

    smallest_group = 2
    warm_up_states = "noised"
    round_updates = 2000
    value: BoundedValue | None

    def __init__(
        self,
        warm_up_updates: int = 600,
        *,
        width: int = 32,
        blocks: int = 0,
        scale: float = 1.0,
        draws: int = 1,
        from_samples: float = 0.0,
        lr: float = 3e-3,
        rounds: int = 0,
        walks: int = 128,
    ) -> None:
        super().__init__()
        for name, number in (("width", width), ("draws", draws), ("walks", walks)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if blocks < 0:
            raise ValueError(f"blocks must be at least 0, got {blocks}.")
        if not 0 <= from_samples <= 1:
            raise ValueError(f"from_samples is a share of the steps, 0 to 1; got {from_samples}.")
        if warm_up_updates < 0 or (warm_up_updates == 0 and from_samples < 1):
            raise ValueError(
                f"warm_up_updates={warm_up_updates} leaves V untrained, whose gradient is the target at a share of "
                f"{1 - from_samples:g} of the steps: give at least 1, e.g. 600, or from_samples 1."
            )
        if rounds < 0 or (rounds > 0 and warm_up_updates == 0):
            raise ValueError(
                f"rounds={rounds} refine a V: at least 0, and only with warm_up_updates, which are {warm_up_updates}."
            )
        check_positive("scale", scale)
        check_positive("lr", lr)
        self.warm_up_updates, self.width, self.blocks, self.lr = warm_up_updates, width, blocks, lr
        self.scale, self.draws, self.from_samples = scale, draws, from_samples
        self.warm_up_rounds, self.walks = rounds, walks
        self.value_stays, self.learns_samples = warm_up_updates > 0, from_samples > 0
        self.value = None
        self.measure = RTB("vargrad")

    @property
    def learns_value(self) -> bool:
        """It does where its gradient is taken; see `LearnsValue`."""
        return self.warm_up_updates > 0

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Create V; before a state dict is loaded. ValueError: there is no network for states of this shape."""
        if self.learns_value:
            self.value = BoundedValue(dims, features, width=self.width, blocks=self.blocks).requires_grad_(False)

    def warm_up(self, terms: Terms, beta: float, noise: Noise) -> None:
        """Fit V to samples of the prior; see `BoundedValue.fit`."""
        check_beta(beta)
        if self.value is not None:
            self.value.fit(terms, beta, noise, self.warm_up_updates, self.lr)

    def refine(self, walks: Walks, prior: Terms, beta: float, noise: Noise) -> None:
        """Let V agree with the chain where it led; see `BoundedValue.refit`."""
        assert self.value is not None
        self.value.refit(walks, prior, noise, self.round_updates, self.lr / 3)

    def forward(self, terms: Terms, beta: float) -> Loss:
        """What RTB says of the posterior's own trajectories, for the log: nothing is learned from it."""
        measured: Loss = self.measure(terms, beta)
        return measured

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """Where the mean of each transition should be; see the module."""
        if at.mean_0 is not None and at.share < self.from_samples:
            return at.means["prior"] + self.scale * (at.mean_0 - at.means["prior"])
        if self.value is None:
            return at.mean_q  # nothing is known of where other states should lead
        slope = torch.zeros_like(at.mean_q)
        for _ in range(self.draws):
            noise = torch.randn(at.mean_q.shape, generator=at.generator).to(at.mean_q)
            slope += self._slope(at.mean_q + at.std * noise, at) / self.draws
        return at.means["prior"] + self.scale * at.std**2 * slope

    def _slope(self, x_s: Float[Tensor, "batch *dims"], at: States) -> Float[Tensor, "batch *dims"]:
        """grad log F(x_s)."""
        assert self.value is not None
        x_s = x_s.detach().requires_grad_()
        t = torch.full((len(x_s),), at.following, device=x_s.device)
        with torch.enable_grad():
            log_f = self.value.log_f(x_s, t, at.features)
            (slope,) = torch.autograd.grad(log_f.sum(), x_s)
        return slope
