"""The three things a plug-in author implements, and what travels between them.

* `Reward`    images and prompts in, one finite number per image out            (`rewards/`)
* `Prior`     a frozen pretrained chain and the posterior that shares its network (`pipelines/`)
* `Objective` log-densities and rewards in, a scalar loss out                     (`diffusion_rtb/objectives/`)

None of them knows about the others: `train.py` and `eval.py` bring them together by the names in a config. What else a plug-in may
have, because not each of its kind needs it, is in `abilities.py`.

Vocabulary: a *trajectory* x_T … x_0 is one denoising chain, its *transition* x_t -> x_s (s < t) is
Normal(mean, std²·I). log_q and log_p are the posterior's and the prior's log-density of a transition, **summed over all
dimensions, in nats, fp32**. beta is in nats per unit of reward: the target is p*(x) = p(x)·exp(beta·r(x)) / Z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "AimsStates",
    "FollowsReward",
    "KeepsOld",
    "Loss",
    "Objective",
    "Prior",
    "Reward",
    "Samples",
    "States",
    "Terms",
    "WarmsUp",
    "WeighsSamples",
]


@runtime_checkable
class Reward(Protocol):
    """r(x): anything callable on samples and their prompts, one finite float per sample, higher is better.

    Samples are images in [0, 1], (batch, 3, height, width), or the vectors (batch, n) of an analytic prior.

    A third parameter, if there is one called `metadata`, gets a mapping per sample: what the run's prompt file says of its prompt
    besides the prompt, empty where it says nothing. What a reward may have besides is in `abilities.py`: `load_weights`,
    `check_prompts`, `embed`, `classify`, and a mapping `rewards` of those that it is made of; a memory is in `scoring/memory.py`.
    """

    def __call__(self, images: Float[Tensor, "batch *shape"], prompts: Sequence[str]) -> Float[Tensor, " batch"]: ...


@runtime_checkable
class Prior(Protocol):
    """A stock diffusers pipeline, made stochastic, whose network also carries the trainable posterior.

    The posterior is the network with its adapters on, the prior is the same network with its adapters off: there is no second
    copy of the weights, except of those that are trained themselves (full fine-tuning).

    What some priors can do besides is a protocol each, in `abilities.py` (`TwoPhase`, `ReadsPrompts`, `HasEntry`, `HasBaseModel`,
    `HasSnippet`, `HasElsewhere`) and in `exact.py` (`HasExactTarget`). All members are looked at before training
    (`run/members.py`).

    `rollout` gives `pipe` one generator per trajectory. A loop of one's own draws all noise of a call by
    `seeds.trajectory_noise`: trajectory by trajectory and step by step it takes several times as long.
    """

    @property
    def pipe(self) -> Any:
        """The stock diffusers pipeline; `pipe.scheduler` is what the recorder wraps."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of one state x_t without the batch, e.g. (4, 8, 8)."""

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts: embeddings, guidance, steps, eta; no noise.

        No output type either, unless the pipeline knows none for latents and pays for the one that it takes "latent" for.
        """

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """One vector per prompt, for value networks V(x_t, t, prompt)."""

    def decode(self, x_0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *shape"]:
        """Images in [0, 1], (batch, 3, height, width), or vectors (batch, n); float32, without gradients."""

    def attach(self, *args: Any, **settings: Any) -> None:
        """Add the posterior's adapters (identity at the start: posterior = prior) and freeze everything else.

        A prior writes out its own arguments, annotated: `posterior` of a config is checked against them and given by name. One
        called `seed` gets the run's where the config has none.
        """

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The posterior's trainable parameters by name; empty before `attach`."""

    def as_prior(self) -> AbstractContextManager[None]:
        """Inside the block the network is the prior (adapters off)."""

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as plain JSON values, the same at every call.

        Any keys, of which the model card reads these; each is optional:

        * `family`, `dtype`: texts;
        * `adapter`: None before `attach`, then a mapping; of a LoRA with `rank`, `alpha` and `target_modules`; with `full` (True)
          where the weights themselves are trained, and then `target_modules` where not all are;
        * `guidance`: a mapping with `tilted_prior` ("guided" or "unguided"), `scale` and `negative_prompt`, for a prior with
          classifier-free guidance;
        * `sampler`: a mapping; beside `guidance` with `scheduler`, `steps` and `eta` (None: it has none).
        """

    def export(self, folder: Path, card: str) -> None:
        """Write the posterior into a folder, in the format plain diffusers loads where there is one, and `card` as README.md."""


@dataclass(frozen=True, eq=False)
class Terms:
    """What an objective sees of a batch: small tensors on its own device, the states on the host, no networks, no pipelines."""

    log_q: Float[Tensor, "batch steps"]
    """Posterior log-density of each transition; nats. A detached leaf that requires grad: d loss/d log_q is the cotangent."""
    log_p: Float[Tensor, "batch steps"]
    """Prior log-density of the same transitions; nats."""
    reward: Float[Tensor, " batch"]
    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table; trajectories of one prompt form a group."""
    x: Float[Tensor, "batch steps_and_one *dims"]
    """The states, x[:, 0] = x_T noise, x[:, -1] = x_0; on the host, as large as they are: a network fetches what it looks at."""
    timesteps: Float[Tensor, " steps"]
    """Scheduler timestep of x[:, i], i < steps."""
    features: Float[Tensor, "batch features"]
    """Prompt features for value networks."""
    log_behaviour: Float[Tensor, "batch steps"] | None = None
    """Log-density of the transitions under the chain that really drew them, where known; nats."""
    kl: Float[Tensor, "batch steps"] | None = None
    """KL(q || p) of each transition in closed form, nats; for objectives with `uses_kl`. A leaf like log_q."""
    estimate: Float[Tensor, "batch states"] | None = None
    """r(x0_hat) by the prior at x_T and every `estimates_every` steps, for objectives that say so; reward units."""
    signal: Float[Tensor, " states"] | None = None
    """a²/(a² + b²) of these states, x_t = a·x_0 + b·noise."""


@dataclass(frozen=True, eq=False)
class Loss:
    """What an objective answers."""

    loss: Float[Tensor, ""]
    residual: Float[Tensor, " batch"]
    """log Z + log_q - log_p - beta·r of the whole trajectory, detached; nats."""
    log_z: Float[Tensor, " batch"]
    """The log Z the residual used, per trajectory, detached; nats."""
    to_nats: float = 1.0
    """What makes the loss one in nats: beta for a loss in reward units, beta² for one in their square. Gradients are taken of
    loss·to_nats, so that no step, no clipping and no eps depends on the unit of the reward; `loss` is logged as it is."""


@runtime_checkable
class Objective(Protocol):
    """A loss on trajectories. It is a `torch.nn.Module` when it owns scalars (log Z) or a value network.

    What it may have besides: what `ObjectiveTraits` and `ChecksSteps` say (`abilities.py`), and `WarmsUp` below.
    """

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Create what depends on the run: per-prompt log Z for `prompts` prompts, V for states of shape `dims`."""

    def __call__(self, terms: Terms, beta: float) -> Loss: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class WarmsUp(Protocol):
    """An objective that learns from trajectories of the prior before the first iteration."""

    def warm_up(self, terms: Terms, beta: float, noise: Callable[..., Tensor]) -> None:
        """Called once, with as many trajectories per prompt as the `capacity` of `prior_buffer`; noise(x_0, timesteps, generator)
        is x_t by the scheduler's forward process.
        """


@dataclass(frozen=True, eq=False)
class Walks:
    """Trajectories that something led, and the prior's own transitions from their states; on the host but for the features."""

    x: Float[Tensor, "batch steps_and_one *dims"]
    """The states, x[:, -1] = x_0."""
    times: Float[Tensor, " steps_and_one"]
    """Scheduler timestep of each, 0 for x_0."""
    mean_p: Float[Tensor, "batch steps *dims"]
    """Of the prior's transition from each; without noise the next state itself."""
    std: Float[Tensor, " steps"]
    reward: Float[Tensor, " batch"]
    features: Float[Tensor, "batch features"]


@runtime_checkable
class RefinesValue(Protocol):
    """An objective that leads the prior by its V before the first iteration, and learns from where that led."""

    warm_up_rounds: int
    """How often; 0: never."""
    walks: int
    """Trajectories of each prompt in a round."""
    round_updates: int
    """Updates of V after them."""
    scale: float
    """Of the shift that leads them, see `ValueGuidance`."""
    value: Any
    """V, see `LearnsValue`."""

    def refine(self, walks: Walks, prior: Terms, beta: float, noise: Callable[..., Tensor]) -> None:
        """Called after `warm_up`, with what that was given, and after each round."""


@dataclass(frozen=True, eq=False)
class States:
    """States of one step with what both networks make of them, on the prior's device; nothing here has a gradient."""

    step: int
    """Place of the step in the chain, 0 for the noisiest."""
    share: float
    """step / steps: 0 at the noisiest, below 1."""
    dense: int
    """Steps of the whole chain that have a density."""
    x_t: Float[Tensor, "batch *dims"]
    x_0: Float[Tensor, "batch *dims"]
    """What the states were noised from, or their own chain came to."""
    following: float
    """Timestep of the next state, 0 for x_0."""
    std: float
    """Deviation of the transition x_t -> x_s."""
    mean_q: Float[Tensor, "batch *dims"]
    means: Mapping[str, Float[Tensor, "batch *dims"]]
    """The same mean by the networks that the objective `compares` with: "prior", "old"."""
    mean_0: Float[Tensor, "batch *dims"] | None
    """The same mean by a network that knows x_0 (`forward_process.knowing`), where x_0 was noised to x_t and is, nearly, a sample
    of the posterior, or the objective `noises` every sample; else None. At the last step x_0."""
    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table."""
    reward: Float[Tensor, " batch"]
    features: Float[Tensor, "batch features"]
    generator: torch.Generator
    """For what an objective draws; on the host."""
    weight: Float[Tensor, " batch"] | None = None
    """What the objective's `weights` said of each sample, if it has any."""
    adjoint: Float[Tensor, "batch *dims"] | None = None
    """Of the state that this one went to, for an objective that `ReadsAdjoint`: minus the slope of what is still to be earned."""


@runtime_checkable
class AimsStates(Protocol):
    """An objective that learns from states, not from trajectories: it says where the mean of each transition should be.

        loss = mean over states of |mean_q(x_t) - aim(x_t)|² / (2·std²), nats

    The trainer then scores no trajectories but the posterior's own, for what is logged. An update takes one network call of each
    network that it `compares` with and one of the posterior, with its gradient, per state: see `training/updates/regression.py`.
    What it may have besides: what `ObjectiveTraits` says, `WeighsSamples` and `KeepsOld`.
    """

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]: ...


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of an update."""

    prompt: Int[Tensor, " batch"]
    """Rows of the prompt table; samples of one prompt form a group."""
    reward: Float[Tensor, " batch"]
    log_ratio: Float[Tensor, " batch"] | None = None
    """For an objective that `reads_bounds`: an estimate of log q(x_0) - log p(x_0), the difference of both lower bounds; nats."""


@runtime_checkable
class WeighsSamples(Protocol):
    """An objective of states that needs a number for each sample which depends on its group: a weight, an advantage."""

    def weights(self, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
        """One for each; `States.weight` has them."""


@runtime_checkable
class KeepsOld(Protocol):
    """An objective of states with an older posterior beside the one that it trains: it `compares` with it or lets it draw."""

    def keeps_old(self, iteration: int) -> float:
        """What share of the old one stays after this iteration, the rest being the posterior's; 0 to 1. It begins as that."""


@runtime_checkable
class ReadsAdjoint(Protocol):
    """An objective of states that reads `States.adjoint`, of its own trajectories: `training/updates/adjoint.py`."""

    adjoint: Literal["lean", "full"]


@runtime_checkable
class FollowsReward(Protocol):
    """An objective whose gradient is that of the reward itself, through the last steps of the posterior's own trajectories.

        loss = mean over trajectories of -beta·r(x_0) + sum over the last steps of KL(q(. | x_t) || p(. | x_t)), nats

    with x_s = mean_q(x_t) + std·z, z fixed. See `training/updates/pathwise.py`.
    """

    def last(self, steps: int, generator: torch.Generator) -> int:
        """How many of the last of so many steps the gradient goes through in this update."""
