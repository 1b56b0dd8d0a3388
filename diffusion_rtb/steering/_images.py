"""Pictures of steered samples, as many of a prompt as are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.sampling.sampler import decoded
from diffusion_rtb.steering._drawn import Steered, steered
from diffusion_rtb.steering._method import Method

__all__ = ["check_batch", "steered_images"]


def check_batch(method: Method, batch: int) -> None:
    """Refuse groups that are larger than what is drawn at once; ValueError."""
    if method.particles > batch:
        raise ValueError(
            f"{type(method).__name__} draws {method.particles} particles at once, and no more than {batch} samples are to be: "
            f"allow {method.particles} or more, or take fewer particles. Memory grows with them."
        )


def steered_images(
    prior: Prior,
    reward: Reward,
    method: Method,
    prompts: Sequence[str],
    count: int,
    beta: float,
    *,
    seed: int = 0,
    batch: int = 64,
    metadata: Mapping[str, Metadata] | None = None,
    learned: Callable[..., Tensor] | None = None,
    told: Callable[[str, Steered], object] = lambda prompt, group: None,
) -> Iterator[Float[Tensor, "_ *shape"]]:
    """`count` images per prompt, those of one prompt adjacent; each group of particles gives the `kept` first ones of it.

    Args:
        prior: See `steered`; so are `reward`, `method` and `beta`.
        reward: r.
        method: How.
        prompts: At least one.
        count: Images per prompt.
        beta: Nats per unit of reward.
        seed: Of the noise; an image depends on it, its prompt and its number only.
        batch: Samples drawn at once.
        metadata: Of prompts of which more is known.
        learned: See `steered`.
        told: Called for each group of each prompt with what became of it.

    Raises:
        ValueError: see `check_batch` and `steered`.
    """
    check_batch(method, batch)
    together = max(1, batch // method.particles)
    for prompt in prompts:
        groups = list(range(-(-count // method.kept)))
        left = count
        for first in range(0, len(groups), together):
            here = groups[first : first + together]
            seeds = [seed_of(seed, "steered", prompt, group) for group in here]
            known = [(metadata or {}).get(prompt, {})] * len(here)
            found = steered(prior, reward, method, [prompt] * len(here), seeds, beta, metadata=known, learned=learned)
            told(prompt, found)
            rows = [g * method.particles + k for g in range(len(here)) for k in range(method.kept)][:left]
            left -= len(rows)
            yield decoded(prior, found.trajectory.x_0[rows])
