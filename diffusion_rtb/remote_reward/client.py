"""Ask reward servers for rewards: splitting, round robin, bounded retries with back-off, and nothing that is made up.

Every image gets the number that a server computed for it, or an error is raised; there is no default value.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count
from time import monotonic

import numpy as np
from jaxtyping import Float32, Float64
from urllib3.exceptions import HTTPError

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.remote_reward.codec import Post, encode_prompts, posts
from diffusion_rtb.remote_reward.http import Endpoint, Reply
from diffusion_rtb.remote_reward.messages import (
    JSON_TYPE,
    Answer,
    Checked,
    Encoding,
    Failure,
    Info,
    Model,
    WireError,
    parsed,
)

__all__ = ["TOKEN_VARIABLE", "Patience", "RemoteRewardError", "RewardClient", "check_token", "read_token"]

LOG = logging.getLogger(__name__)

TOKEN_VARIABLE = "DIFFUSION_RTB_TOKEN"

TRY_AGAIN = {408, 429, 502, 503, 504}
"""Answers that mean "not now"; all others mean "not like this" and are final."""


PROMPTS = 1000
"""In one request to check them; with metadata of the largest size allowed it is as large as a request may be."""


class RemoteRewardError(RuntimeError):
    """There is no reward for these images, and asking again will not help."""


@dataclass(frozen=True)
class Patience:
    """How long to wait. The defaults outlast a server that takes a minute to come back."""

    timeout: float = 60.0
    """Seconds for one request, all in all."""
    retries: int = 8
    """Further rounds over all servers after the first."""
    backoff: float = 0.5
    """Seconds before the first retry; doubles with each, and is varied by up to a half so that clients spread out."""
    most: float = 16.0
    """Seconds before a retry at most; for this long a server that failed is also asked after the others."""

    def __post_init__(self) -> None:
        for name, value in (("timeout", self.timeout), ("backoff", self.backoff), ("max_backoff", self.most)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be a positive number of seconds.")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}: it must be 0 or more.")


def read_token(variable: str) -> str | None:
    """The token in an environment variable, None where it is not set; ValueError as in `check_token`."""
    token = os.environ.get(variable)
    if token is None:
        return None
    try:
        return check_token(token)
    except ValueError as error:
        raise ValueError(f"The token in {variable} {error}") from None


def check_token(token: str) -> str:
    """The token itself; ValueError, without showing it, where it could not travel in a header or could be guessed."""
    if len(token) < 16 or not all("!" <= letter <= "~" for letter in token):
        raise ValueError(
            f"has {len(token)} characters: it needs at least 16, printable ASCII without spaces. "
            'Make one: python -c "import secrets; print(secrets.token_urlsafe())".'
        )
    return token


class RewardClient:
    """A group of servers of one reward.

    Args:
        servers: Base addresses. All have to answer now; later one is enough.
        encoding: Of the images.
        batch: Images per request at most; None: what the servers take.
        token: Sent as `Authorization: Bearer`.
        patience: Timeouts and retries.

    Raises:
        RemoteRewardError: a server does not answer or refuses, or the servers serve different rewards.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        encoding: Encoding = "safetensors",
        batch: int | None = None,
        token: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.patience = patience or Patience()
        headers = {"User-Agent": "diffusion-rtb"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        self._endpoints = [Endpoint(url, timeout=self.patience.timeout, headers=headers) for url in servers]
        self._resting = dict.fromkeys(servers, 0.0)
        self._turn = count()
        # Of its own: jitter must not move the random numbers of a run.
        self._random = random.Random()
        self.encoding: Encoding = encoding
        self.infos = [self._info(endpoint) for endpoint in self._endpoints]
        self.reward_id = self._agreed()
        limits = [info.max_batch for info in self.infos]
        self._batch = min([*limits, *([] if batch is None else [batch])])
        self._pixels = min(info.max_pixels for info in self.infos)
        self._bytes = min(info.max_body_bytes for info in self.infos)

    @property
    def takes_metadata(self) -> bool:
        """The servers' reward takes the metadata of prompts."""
        return any(info.metadata for info in self.infos)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Show all prompts of a run to the servers' reward.

        Raises:
            ValueError: the reward does not take them.
            RemoteRewardError: see `score`.
        """
        for start in range(0, len(prompts), PROMPTS):
            cut = slice(start, start + PROMPTS)
            body = encode_prompts(prompts[cut], metadata[cut])
            url, content = self._ask(self._endpoints, "/prompts", threading.Event(), body, JSON_TYPE)
            refusal = self._understood(Checked.model_validate_json, content, url).refusal
            if refusal is not None:
                raise ValueError(f"{url}: {refusal}")

    def score(
        self,
        images: Float32[np.ndarray, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> Float64[np.ndarray, " batch"]:
        """The rewards, in the order of the images; metadata are sent where the reward takes them.

        Raises:
            ValueError: images or prompts cannot be sent; see `encode`.
            RemoteRewardError: a server refused, or answered with something else than one finite number per image; or none answered
                after all retries.
        """
        rows = [{} for _ in prompts] if metadata is None else metadata
        requests = self._requests(images, prompts, rows if self.takes_metadata else None)
        if len(requests) <= 1:
            parts = [self._score(request, threading.Event()) for request in requests]
        else:
            parts = self._together(requests)
        return np.concatenate(parts) if parts else np.zeros(0)

    def close(self) -> None:
        """Close the connections that are kept for the next call."""
        for endpoint in self._endpoints:
            endpoint.close()

    # One call as several requests

    def _requests(
        self,
        images: Float32[np.ndarray, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None,
    ) -> list[Post]:
        """As many as keep every server busy, none beyond the limits."""
        if len(images) == 0:
            return []
        area = images.shape[2] * images.shape[3]
        share = math.ceil(len(images) / len(self._endpoints))
        size = max(1, min(share, self._batch, self._pixels // area))
        return posts(images, prompts, metadata, self.encoding, size=size, most_bytes=self._bytes)

    def _together(self, requests: list[Post]) -> list[Float64[np.ndarray, " _"]]:
        """One request in flight per server; the first failure for good ends all."""
        stop = threading.Event()
        with ThreadPoolExecutor(len(self._endpoints), thread_name_prefix="remote-reward") as pool:
            futures = [pool.submit(self._score, request, stop) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                for future in futures:
                    future.cancel()
                raise

    def _score(self, post: Post, stop: threading.Event) -> Float64[np.ndarray, " _"]:
        turn = next(self._turn) % len(self._endpoints)
        order = self._endpoints[turn:] + self._endpoints[:turn]
        url, content = self._ask(order, "/score", stop, post.body, post.media_type)
        answer = self._understood(Answer.model_validate_json, content, url)
        if answer.reward_id != self.reward_id:
            raise RemoteRewardError(
                f"{url} now serves {answer.reward_id!r}; this run began with {self.reward_id!r}. Its rewards would not compare."
            )
        if len(answer.rewards) != post.images:
            raise RemoteRewardError(f"{url} answered with {len(answer.rewards)} rewards for {post.images} images.")
        return np.array(answer.rewards, dtype=np.float64)

    # One request

    def _info(self, endpoint: Endpoint) -> Info:
        url, content = self._ask([endpoint], "/info", threading.Event())
        return self._understood(Info.model_validate_json, content, url)

    def _agreed(self) -> str:
        found = {endpoint.url: info.reward_id for endpoint, info in zip(self._endpoints, self.infos, strict=True)}
        if len(set(found.values())) > 1:
            raise RemoteRewardError(f"The servers serve different rewards: {found}. Serve one, with equal arguments.")
        return self.infos[0].reward_id

    def _ask(
        self,
        order: Sequence[Endpoint],
        path: str,
        stop: threading.Event,
        body: bytes | None = None,
        media_type: str | None = None,
    ) -> tuple[str, bytes]:
        """Address and content of the first good answer; rounds over the servers, with growing pauses between them."""
        start, reasons = monotonic(), dict[str, str]()
        for attempt in range(self.patience.retries + 1):
            asked = 0.0
            for endpoint in sorted(order, key=lambda e: self._resting[e.url] > monotonic()):
                if stop.is_set():
                    raise RemoteRewardError("Another request of the same batch failed.")
                reply = self._try(endpoint, path, body, media_type)
                if isinstance(reply, bytes):
                    return endpoint.url, reply
                reasons[endpoint.url], wanted = reply
                asked = max(asked, wanted)
            if attempt < self.patience.retries:
                stop.wait(self._pause(attempt, asked, reasons))
        shown = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        raise RemoteRewardError(
            f"No reward server answered in {self.patience.retries + 1} tries over {monotonic() - start:.0f} s. {shown}. "
            "Is `diffusion-rtb serve-reward` running there?"
        )

    def _try(
        self, endpoint: Endpoint, path: str, body: bytes | None, media_type: str | None
    ) -> bytes | tuple[str, float]:
        """The content of a good answer, or why there is none yet and the seconds that the server asks to wait."""
        try:
            reply = endpoint.exchange("GET" if body is None else "POST", path, body, media_type)
        except ssl.SSLCertVerificationError as error:
            raise RemoteRewardError(f"{endpoint.url} is not who it says: {error}") from error
        except (OSError, HTTPException, HTTPError) as error:
            reason, wanted = f"{type(error).__name__}: {error}".removesuffix(": "), 0.0
        else:
            if reply.status == 200:
                self._resting[endpoint.url] = 0.0
                return reply.content
            reason, wanted = _told(reply), reply.retry_after or 0.0
            if reply.status not in TRY_AGAIN:
                raise RemoteRewardError(f"{endpoint.url} refused: {reason}")
        self._resting[endpoint.url] = monotonic() + self.patience.most
        return reason, wanted

    def _pause(self, attempt: int, asked: float, reasons: dict[str, str]) -> float:
        seconds = self.patience.backoff * 2**attempt * self._random.uniform(0.5, 1.5)
        seconds = min(max(seconds, asked), self.patience.most)
        shown = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        LOG.warning("No reward yet (%s); retry %d of %d in %.1f s", shown, attempt + 1, self.patience.retries, seconds)
        return seconds

    def _understood(self, validate: Callable[[bytes], Model], content: bytes, url: str) -> Model:
        try:
            return parsed(validate, content, "answer")
        except WireError as error:
            raise RemoteRewardError(f"{url} gave an answer that cannot be used: {error}") from None


def _told(reply: Reply) -> str:
    """Status and the server's own words; what is not from a reward server is quoted in part."""
    try:
        failure = parsed(Failure.model_validate_json, reply.content, "answer")
    except WireError:
        text = reply.content[:200].decode("utf-8", errors="replace")
        return f"status {reply.status}: {json.dumps(text, ensure_ascii=False)}"
    return f"status {reply.status} ({failure.code}): {failure.message}"
