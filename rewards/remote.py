"""A reward that another process computes: `diffusion-rtb serve-reward`, in another environment or on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.remote_reward.client import TOKEN_VARIABLE, Patience, RemoteRewardError, RewardClient, read_token
from diffusion_rtb.remote_reward.http import check_url
from diffusion_rtb.remote_reward.messages import ENCODINGS, Encoding

__all__ = ["Remote"]


class Remote(TwoPhase):
    r"""r(x) as the servers compute it, or an error: a request that fails is never turned into a number.

    The batch is shared out to the servers in turn, in parallel, and failed requests are asked again of the next one. When all
    retries are used up a RemoteRewardError stops the run, which then saves a checkpoint and can be continued. The worst case
    is about (retries + 1)·(number of servers)·timeout seconds; of servers that are down, about one minute.

    Args:
        servers: Address or addresses, http://HOST:PORT. All must answer at the start and serve the same reward.
        encoding: "safetensors" sends the images exactly as they are. "json_png" takes a third of that or less, but rounds to 8
            bits: values differ by up to 1/510 from what a local reward would see.
        batch: Images per request at most; default what the servers allow.
        timeout: Seconds for one request.
        retries: Further rounds over all servers.
        backoff: Seconds before the first retry, doubling up to `max_backoff`.
        max_backoff: Seconds before a retry at most.
        token_variable: Environment variable that holds the servers' token, where they want one. The token itself has no place
            in a config: configs are saved with the run.
    """

    def __init__(
        self,
        servers: str | list[str],
        *,
        encoding: Encoding = "safetensors",
        batch: int | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 0.5,
        max_backoff: float = 16.0,
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        urls = _listed(servers)
        if not urls:
            raise ValueError("servers is empty: name at least one, e.g. http://127.0.0.1:8817.")
        double = next((url for url in urls if urls.count(url) > 1), None)
        if double is not None:
            raise ValueError(f"servers names {double!r} twice.")
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}: use one of {', '.join(ENCODINGS)}.")
        if batch is not None and batch < 1:
            raise ValueError(f"batch is {batch}: at least 1 image per request, or null for what the servers allow.")
        patience, token = Patience(timeout, retries, backoff, max_backoff), read_token(token_variable)
        self._connect = partial(RewardClient, urls, encoding=encoding, batch=batch, token=token, patience=patience)

    no_gradient = "its servers answer numbers: run the reward here, by its own name"

    @cached_property
    def client(self) -> RewardClient:
        """The connection to the servers, all of which have answered."""
        return self._connect()

    def load_weights(self) -> None:
        _ = self.client

    @property
    def takes_metadata(self) -> bool:
        """The servers' reward takes the metadata of prompts."""
        return self.client.takes_metadata

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Ask the servers' reward about all prompts; ValueError where it does not take them."""
        self.client.check_prompts(prompts, metadata)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"remote sends images of shape (batch, 3, height, width), got {tuple(images.shape)}.")
        pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
        values = torch.from_numpy(self.client.score(pixels, prompts, metadata)).to(torch.float32)
        if not torch.isfinite(values).all():
            raise RemoteRewardError(f"{self.client.reward_id} gave a reward beyond the range of float32.")
        return values.to(images.device)


def _listed(servers: str | list[str]) -> list[str]:
    return [check_url(url) for url in ([servers] if isinstance(servers, str) else servers)]
