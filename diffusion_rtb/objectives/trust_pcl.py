r"""Trust-PCL, path consistency learning relative to a reference policy, and its dictionary to RTB.

    reinforcement learning                  here
    --------------------------------------  ---------------------------------------------------------
    policy pi                               posterior q
    reference policy pi_ref                 prior p
    state s_i, action                       x_t with its prompt, the next state x_s
    reward at the end                       r(x_0)
    weight alpha of KL(pi || pi_ref)        1 / beta
    V_soft(s)                               alpha · log F(x_t),  F(x_t) = E_p[ exp(beta·r(x_0)) | x_t ]
    V_soft(s_0)                             alpha · log Z, where the chain is memoryless
    Trust-PCL on a whole trajectory         L_TrustPCL = alpha² · L_RTB
    Trust-PCL on a stretch of it            sub-trajectory balance relative to the prior

The consistency of the optimal policy between any two states of a trajectory, x_i before x_j, in reward units:

    residual_ij = -V(x_i) + V(x_j) + alpha · sum_{i <= t < j} (log_p - log_q),     V(x_0) = r(x_0)

    loss = mean over trajectories and stretches of 1/2 residual_ij²

Over a whole trajectory only V(x_T) is left, and the residual is -alpha times RTB's. Over stretches of `length` steps the
network V(x_t, t, prompt) gives each stretch its own target, of less variance and, until V is right, with a bias.
With length = 1 it is a soft Bellman error, with length = steps RTB with a log Z that depends on x_T.

What is optimised is beta² times this loss, in nats: (c·r, beta/c) is the posterior of (r, beta), and a run learns it in the same
steps whatever c is. `huber_delta` and `dead_zone` are nats, the weights of V compute V / alpha_0, alpha_0 that of the first batch.

Sources: Nachum et al. 2018, https://arxiv.org/abs/1707.01891; Deleu, Nouri, Bengio, Precup 2025,
https://arxiv.org/abs/2509.01632.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_beta, check_choice, check_terms
from diffusion_rtb.objectives._penalty import Penalty, PenaltyKind
from diffusion_rtb.objectives._policy import behaviour
from diffusion_rtb.objectives._value import ValueNetwork, values_along
from diffusion_rtb.objectives._value_fit import Noise, fit_value
from diffusion_rtb.objectives.rtb import RTB, rtb_residual

__all__ = ["TrustPCL", "trust_pcl_residual"]


def trust_pcl_residual(
    log_q: Float[Tensor, "batch steps"],
    log_p: Float[Tensor, "batch steps"],
    values: Float[Tensor, "batch boundaries"],
    beta: float,
) -> Float[Tensor, "batch stretches"]:
    """residual_ij = -V(x_i) + V(x_j) + alpha · sum_{i <= t < j} (log_p - log_q), for stretches of equal length.

    Args:
        log_q: posterior log-densities; nats.
        log_p: prior log-densities; nats.
        values: V at the boundaries of the stretches, first x_T, last x_0 (there the reward); reward units. One stretch
            lies between each two neighbours.
        beta: 1 / alpha; nats per unit of reward.
    """
    stretches = values.shape[1] - 1
    log_ratio = (log_p - log_q).unflatten(1, (stretches, -1)).sum(dim=2)
    return values[:, 1:] - values[:, :-1] + log_ratio / beta


GUMBEL_LARGEST = 7.0
"""z beyond which `gumbel_loss` is scaled down; nats."""


def gumbel_loss(z: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """mean(exp(z) - z - 1) of z = beta·(y - V): its minimiser is V = 1/beta · log E[exp(beta·y)].

    Where a z is above 7 the whole mean is divided by exp(max z - 7): exp(z) stays finite at any beta, and the gradient keeps its
    direction. At the minimiser E[exp(z)] is 1, so that fewer than one z in 1,000 is above 7.

    Source: Gumbel regression, Garg et al. 2023, https://arxiv.org/abs/2301.02328.
    """
    excess = (z.detach().max() - GUMBEL_LARGEST).clamp(min=0)
    scale = torch.exp(-excess)
    return torch.mean(torch.expm1(z - excess) + (1 - scale) - scale * z)


def returns_loss(
    values: Float[Tensor, "batch boundaries"],
    reward: Float[Tensor, " batch"],
    log_ratio: Float[Tensor, "batch steps"],
    beta: float,
) -> Float[Tensor, ""]:
    """`gumbel_loss` of z = beta·(y_i - V(x_i)) with the return y_i = r - alpha · sum_{t >= i} log_ratio_t.

    E_b[exp(beta·y_i) given x_i] = E_p[exp(beta·r) given x_i] for any chain b that drew the trajectories, if log_ratio is
    log b - log p: the importance weight is in the return, and the minimiser is the soft value of the prior.

    Args:
        values: V at the start of each stretch; reward units.
        reward: r(x_0).
        log_ratio: log b - log p of every transition; nats.
        beta: 1 / alpha; nats per unit of reward.
    """
    length = log_ratio.shape[1] // values.shape[1]
    to_come = log_ratio.flip(1).cumsum(1).flip(1)[:, ::length]
    return gumbel_loss(beta * (reward[:, None] - values) - to_come)


VALUE_LOSSES = ("consistency", "returns", "none")
WARM_UP_STATES = ("noised", "recorded")


class TrustPCL(nn.Module):
    """Trust-PCL with the prior as reference, an `Objective`; its loss is in squared reward units, its gradient taken in nats.

    Args:
        length: steps of a stretch, a divisor of the trajectory's steps; None for whole trajectories, which is
            `RTB(scale="reward")`.
        log_z: for whole trajectories where V(x_T) = log Z / beta comes from: "vargrad" (when None), "per_prompt" or
            "learned". Not with a `length`: there V is a network.
        width: channels of the value network; read only with a `length`.
        warm_up_updates: updates of V on prior samples before the first iteration, see `warm_up`; with a `length`.
        warm_up_states: where the states x_t of these updates come from. "noised": prior samples x_0 noised anew each time by
            the scheduler's forward process, so that few rewards give unlimited states; right as far as the prior's chain
            reverses that process (a well-trained prior, eta 1). "recorded": the states of the prior's own trajectories;
            right for any chain, and soon learned by heart.
        value_loss: how V learns during training. "consistency": with the posterior, from the same residuals. "returns":
            from what trajectories came to, see `returns_loss`; this needs the density they were drawn with. "none": V stays
            as the warm-up left it, for it belongs to the prior and the reward and not to the posterior.
        boundary: V(x_t) = s·r(x0_hat) + sqrt(1 - s)·F(x_t), F the network, x0_hat the prior's estimate of x_0 and s = a²/(a² + b²)
            the signal's share of x_t: the reward itself as x_t becomes x_0. For one call of prior, decoder and reward per stretch,
            no gradient of the reward; with a `length`, and without a warm-up, which has no x0_hat. (Score as Action, Zhao et al.
            2025, https://arxiv.org/abs/2502.01819.)
        loss: "squared", "huber", "forward_kl" or "jeffreys", see `RTB`; the last two on d = -beta·residual_ij, which is
            log [F(x_i) q(x_j | x_i)] - log [F(x_j) p(x_j | x_i)] of the path of a stretch.
        huber_delta: where Huber's slope stops growing; nats.
        dead_zone: c: a stretch with residual² <= c makes no update; nats².

    Raises:
        ValueError: an argument is none of those allowed.
    """

    value: nn.Module | None

    def __init__(
        self,
        length: int | None = None,
        log_z: Literal["learned", "per_prompt", "vargrad"] | None = None,
        *,
        width: int = 32,
        warm_up_updates: int = 0,
        warm_up_states: Literal["noised", "recorded"] = "noised",
        value_loss: Literal["consistency", "returns", "none"] = "consistency",
        boundary: bool = False,
        loss: PenaltyKind = "squared",
        huber_delta: float = 1.0,
        dead_zone: float = 0.0,
    ) -> None:
        super().__init__()
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1 step, or None for whole trajectories; got {length}.")
        if length is not None and log_z is not None:
            raise ValueError(
                f"log_z={log_z!r} is for whole trajectories; with length={length} the value network takes its place. "
                "Remove log_z, or set length to None."
            )
        if width < 1:
            raise ValueError(f"width must be at least 1 channel, got {width}.")
        if warm_up_updates < 0 or (warm_up_updates > 0 and length is None):
            raise ValueError(
                f"warm_up_updates={warm_up_updates} is for the value network: at least 0, and only with a length; got "
                f"length={length}."
            )
        check_choice("warm_up_states", warm_up_states, WARM_UP_STATES)
        if check_choice("value_loss", value_loss, VALUE_LOSSES) == "none" and warm_up_updates == 0:
            raise ValueError(
                'value_loss="none" leaves V untrained: set warm_up_updates, e.g. 600, or another value_loss.'
            )
        if boundary and (length is None or warm_up_updates > 0):
            raise ValueError(
                "boundary puts r(x0_hat) into V, which there is with a length alone, and nobody knows x0_hat of the warm-up's "
                f"states: set a length, and warm_up_updates 0; got length={length}, warm_up_updates={warm_up_updates}."
            )
        self.boundary, self.estimates_every = boundary, (length or 0) if boundary else 0
        self.length = length
        self.warm_up_states = warm_up_states
        self.value_loss = value_loss
        self.importance_weighted, self.value_stays = value_loss == "returns", value_loss == "none"
        self.width = width
        self.warm_up_updates = warm_up_updates
        self.penalty = Penalty(loss, huber_delta, dead_zone)
        self.value = None
        self.whole: RTB | None = None
        if length is None:
            self.whole = RTB(log_z or "vargrad", loss, huber_delta=huber_delta, dead_zone=dead_zone, scale="reward")
        self.smallest_group = 1 if self.whole is None else self.whole.smallest_group

    @property
    def learns_value(self) -> bool:
        """See `LearnsValue`: with a `length` it does; the network of a `boundary` form is not V by itself."""
        return self.whole is None and not self.boundary

    def check_steps(self, steps: int) -> None:
        """Refuse a `length` that does not divide the steps of the run's trajectories, before any is drawn; ValueError."""
        if self.length is not None:
            check_length(self.length, steps)

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Create log Z or the value network; before the optimizer and before a state dict is loaded.

        Raises:
            ValueError: a value network is needed and there is none for states of this shape.
        """
        if self.whole is not None:
            self.whole.prepare(prompts, dims, features)
        else:
            self.value = ValueNetwork(dims, features, width=self.width).requires_grad_(self.value_loss != "none")

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch; its `residual` and `log_z` are those of whole trajectories, in nats.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a `length` that does not
                divide the steps, a group of one trajectory under VarGrad.
            RuntimeError: `prepare` was not called.
        """
        if self.whole is not None:
            result: Loss = self.whole(terms, beta)
            return result
        check_terms(terms, beta)
        values = self.boundary_values(terms, beta)
        follow = values if self.value_loss == "consistency" else values.detach()
        # The sign of RTB's residual, as penalties have it.
        nats = -beta * trust_pcl_residual(terms.log_q, terms.log_p, follow, beta)
        log_z = values[:, 0].detach() * beta
        residual = rtb_residual(terms.log_q.detach(), terms.log_p, terms.reward, log_z, beta)
        loss = torch.mean(self.penalty(nats))
        if self.value_loss == "returns":
            loss = loss + returns_loss(values[:, :-1], terms.reward, behaviour(terms) - terms.log_p, beta)
        return Loss(loss / beta**2, residual, log_z, to_nats=beta**2)

    def warm_up(self, terms: Terms, beta: float, noise: Noise, lr: float = 3e-3) -> None:
        r"""Fit V to prior samples, where the soft value is V(x_t) = 1/beta · log E_p[exp(beta·r(x_0)) given x_t].

        Without it the first policy updates follow a V that knows nothing, and the difference V(x_j) - V(x_i), which tells
        the steps that decided the reward from those that did not, is noise. It minimises `gumbel_loss` of z = beta·(r - V).

        Args:
            terms: prior trajectories; only states, rewards and features are read.
            beta: 1 / alpha; nats per unit of reward.
            noise: x_t of (x_0, timesteps, generator): the forward process, read with `warm_up_states="noised"`.
            lr: of Adam, for this fit alone.
        """
        if self.value is None or self.warm_up_updates == 0:
            return
        check_beta(beta)
        batch = len(terms.reward)
        if isinstance(self.value, ValueNetwork):
            soft = torch.logsumexp(beta * terms.reward.double(), 0) - math.log(batch)
            self.value.start((soft / beta).to(terms.reward.dtype), 1 / beta)
        fit_value(
            self.value,
            terms,
            lambda value, row: gumbel_loss(beta * (terms.reward[row] - value)),
            noise if self.warm_up_states == "noised" else None,
            self.warm_up_updates,
            lr,
        )
        self.value.requires_grad_(self.value_loss != "none")

    def boundary_values(self, terms: Terms, beta: float) -> Float[Tensor, "batch boundaries"]:
        """V at x_T and then every `length` steps, the last one being the reward of x_0; reward units."""
        length = check_length(self.length, terms.log_q.shape[1])
        start = torch.mean(log_weight(terms.log_q, terms.log_p, terms.reward, beta)) / beta
        values = values_along(self.value, terms, start, beta, length)
        if self.boundary:
            if terms.estimate is None or terms.signal is None:
                raise ValueError(
                    "boundary needs Terms.estimate and Terms.signal, which the trainer gives; they are None."
                )
            s = terms.signal.to(values)
            values = s * terms.estimate + (1 - s).sqrt() * values
        return torch.cat([values, terms.reward[:, None]], dim=1)


def check_length(length: int | None, steps: int) -> int:
    """The length itself where it divides the steps of a trajectory; ValueError where not, with those that do."""
    allowed = [d for d in range(1, steps + 1) if steps % d == 0]
    if length not in allowed:
        raise ValueError(
            f"length={length} does not divide the trajectory's {steps} steps into equal stretches; "
            f"allowed are {', '.join(map(str, allowed))}, or null for whole trajectories."
        )
    return length
