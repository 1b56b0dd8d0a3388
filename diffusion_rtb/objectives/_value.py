r"""V(x_t, t, prompt): the value network of sub-trajectory objectives, in reward units.

    V(x_t) = alpha · log E_p[ exp(r(x_0) / alpha) | x_t ]

the soft value of a state: how much reward the prior's continuations promise. The trunk is a small convolutional network
for images, videos and packed tokens, and a multi-layer perceptron for vectors; time and prompt scale
and shift every layer. Residual blocks, where there are any, sit where the states are smallest. The output layer starts at zero,
so that V starts as one number for all states: a random V would send the posterior after noise before anything is known about the
reward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint

from diffusion_rtb.interfaces import Terms

__all__ = ["Block", "ValueNetwork", "time_embedding", "values_along"]

SMALLEST = 4
"""Height, width, frames or tokens that are left as they are; more are halved until they fit in it."""

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def time_embedding(t: Float[Tensor, " rows"], size: int) -> Float[Tensor, "rows size"]:
    """cos and sin of t at size/2 frequencies from 1 to 1/10,000 per unit of t (scheduler timesteps run to 1,000)."""
    half = size // 2
    frequency = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10_000) / half))
    angle = t[:, None] * frequency[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ValueNetwork(nn.Module):
    """V(x_t, t, prompt) for states of shape `dims`; reward units.

    Args:
        dims: (n,); (tokens, channels), as pipelines pack an image row by row; (channels, height, width); or a video's
            (channels, frames, height, width), the first two in either order.
        features: length of a prompt's feature vector; 0 for no prompt. Only its direction is used.
        width: channels of each layer, also half the size of the time embedding.
        blocks: residual blocks behind the other layers, as He et al. 2016 have them, https://arxiv.org/abs/1603.05027.

    Raises:
        ValueError: no trunk for states of this shape.
    """

    initialised: Tensor
    unit: Tensor

    def __init__(self, dims: tuple[int, ...], features: int, *, width: int = 32, blocks: int = 0) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.width = width
        layers, size = trunk(self.dims, width)
        layers += [Block(type(layers[-1]), width) for _ in range(blocks)]
        self.condition = nn.Sequential(nn.Linear(2 * width + features, 2 * width), nn.SiLU())
        self.layers = nn.ModuleList(layers)
        self.films = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in layers)
        self.output = nn.Linear(size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def start(self, value: Float[Tensor, ""], unit: float = 1.0) -> None:
        """Make V this number everywhere: the estimate of alpha·log Z that a first batch gives; only while untrained.

        Args:
            value: reward units.
            unit: what the weights compute V in, for good; reward units. With alpha = 1/beta they compute nats, and learn as
                fast whatever the unit of the reward is.
        """
        self.unit.fill_(unit)
        self.output.bias.fill_(value / unit)
        self.initialised.fill_(True)

    def forward(
        self,
        x_t: Float[Tensor, "rows *dims"],
        t: Float[Tensor, " rows"],
        features: Float[Tensor, "rows features"],
    ) -> Float[Tensor, " rows"]:
        """V of each state, reward units; x_t may be half precision, the network computes in its own."""
        dtype = self.output.weight.dtype
        # Prompt embeddings of different encoders differ in length by orders of magnitude; their direction is what counts.
        prompt = rms_norm(features.to(dtype), features.shape[1:]) if features.shape[1] else features.to(dtype)
        condition = self.condition(torch.cat([time_embedding(t.to(dtype), 2 * self.width), prompt], dim=1))
        h = x_t.to(dtype).mT if len(self.dims) == 2 else x_t.to(dtype)
        for layer, film in zip(self.layers, self.films, strict=True):
            scale, shift = film(condition).reshape(len(h), -1, *[1] * (h.ndim - 2)).chunk(2, dim=1)
            h = layer(h, scale, shift) if isinstance(layer, Block) else silu(layer(h) * (1 + scale) + shift)
        value: Tensor = self.unit * self.output(h.flatten(1)).squeeze(1)
        return value


class Block(nn.Module):
    """h + layer(silu(norm(h)·(1 + scale) + shift)), of the same shape.

    Args:
        kind: a convolution, which keeps the sides, or `nn.Linear`.
        width: channels.
    """

    def __init__(self, kind: Any, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.layer = kind(width, width) if kind is nn.Linear else kind(width, width, 3, padding=1)

    def forward(
        self,
        h: Float[Tensor, "rows width *sides"],
        scale: Float[Tensor, "rows width *one"],
        shift: Float[Tensor, "rows width *one"],
    ) -> Float[Tensor, "rows width *sides"]:
        """See the class."""
        bent: Tensor = silu(self.norm(h) * (1 + scale) + shift)
        return h + self.layer(bent)


def values_along(
    network: nn.Module | None, terms: Terms, start: Float[Tensor, ""], beta: float, length: int = 1
) -> Float[Tensor, "batch stretches"]:
    """V at x_T and then every `length` steps; reward units. A network that was never trained begins at `start`."""
    if network is None:
        raise RuntimeError("There is no value network yet: call prepare(prompts, dims, features) first.")
    batch, steps = terms.log_q.shape
    if isinstance(network, ValueNetwork) and not network.initialised:
        network.start(start, 1 / beta)
    t = terms.timesteps[::length].repeat(batch)
    features = terms.features.repeat_interleave(steps // length, dim=0)
    values = _in_pieces(network, terms.x[:, :steps:length].flatten(0, 1), t, features)
    return values.unflatten(0, (batch, -1))


NUMBERS = 2**22
"""Numbers of states that a value network sees at once: 16 MiB in float32, 256 latents of Stable Diffusion."""


def _in_pieces(
    network: nn.Module,
    x: Float[Tensor, "rows *dims"],
    t: Float[Tensor, " rows"],
    features: Float[Tensor, "rows features"],
) -> Float[Tensor, " rows"]:
    """V of states on the host, with the memory that one piece of them takes on the network's device.

    Activations of a piece are computed again for its gradient; where all states are one piece there is nothing to save.
    """
    size = max(1, NUMBERS // math.prod(x.shape[1:]))
    if len(x) <= size:
        whole: Tensor = network(x.to(features.device), t, features)
        return whole

    def piece(i: int) -> Tensor:
        values: Tensor = network(x[i : i + size].to(features.device), t[i : i + size], features[i : i + size])
        return values

    return torch.cat([checkpoint(piece, i, use_reentrant=False) for i in range(0, len(x), size)])


def trunk(dims: tuple[int, ...], width: int) -> tuple[list[nn.Module], int]:
    """The layers for states of shape `dims`, and the size of what the last one returns, flattened.

    Raises:
        ValueError: there is none: too many axes, or an empty one.
    """
    if not 1 <= len(dims) <= 4 or min(dims) < 1:
        raise ValueError(
            f"No value network for states of shape {dims}: it takes vectors (n,), (tokens, channels), (channels, height, width) or "
            "(channels, frames, height, width). Use whole trajectories (length null), which need none."
        )
    if len(dims) == 1:
        return [nn.Linear(dims[0], width), nn.Linear(width, width)], width
    channels, *sides = (dims[1], dims[0]) if len(dims) == 2 else dims
    convolution = CONVOLUTIONS[len(sides)]
    layers: list[nn.Module] = [convolution(channels, width, 3, padding=1)]
    while len(layers) == 1 or max(sides) > SMALLEST:
        stride = tuple(2 if side > SMALLEST else 1 for side in sides)
        layers.append(convolution(width, width, 3, stride=stride, padding=1))
        sides = [-(-side // step) for side, step in zip(sides, stride, strict=True)]
    return layers, width * math.prod(sides)
