"""The reward server's HTTP application; see `messages` for the format. Needs the extra `server`.

Order of the checks: token, room in the queue, size while the body arrives, format, and only then the reward. One reward call
runs at a time, in one thread of its own: rewards need not be safe for threads, and a GPU is not shared by two batches.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Shaped
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusion_rtb import __version__
from diffusion_rtb.files.plain_text import plain_lines
from diffusion_rtb.remote_reward.codec import Batch, as_float, decode, decode_prompts
from diffusion_rtb.remote_reward.connections import Bodies, holders_of
from diffusion_rtb.remote_reward.messages import (
    ENCODINGS,
    JSON_TYPE,
    Answer,
    Checked,
    Failure,
    Health,
    Info,
    Limits,
    Model,
    WireError,
)

__all__ = ["CheckPrompts", "Score", "Served", "create_app"]

LOG = logging.getLogger(__name__)

Score = Callable[..., Shaped[np.ndarray, "..."]]
"""Images (batch, 3, height, width) in [0, 1], prompts and, where `Served.metadata`, a mapping each in; one number per image out.

It raises where there is none. What it returns is checked here."""

CheckPrompts = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], None]
"""Prompts and their metadata; raises a ValueError where the reward does not take them."""

DECODED = 2
"""Requests whose pixels are in memory: one that is scored and one that is ready. The others wait as they came."""

READERS = 4
"""Bodies that may be arriving at one time for each that may wait."""


@dataclass(frozen=True)
class Served:
    """What is served, and how much of it.

    A `token` of None lets everybody in.
    """

    reward: str
    reward_id: str
    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 16
    """Requests that are waiting or scored at one time; further ones get 503."""
    read_timeout: float = 30.0
    """Seconds for a body to arrive."""
    token: str | None = field(default=None, repr=False)
    metadata: bool = False
    """The reward takes the metadata of prompts."""


def create_app(score: Score, served: Served, check: CheckPrompts | None = None) -> Starlette:
    """The application, for any ASGI server.

    Args:
        score: The reward. Its exceptions and numbers that are not finite are answered with status 500, never with a number.
        served: Names, limits and token.
        check: What the reward says to the prompts of a run; None: it takes all.
    """
    desk = _Desk(score, served, check)
    names = {"reward": served.reward, "reward_id": served.reward_id, "version": __version__}
    told = Info(**names, **asdict(served.limits), encodings=list(ENCODINGS), metadata=served.metadata)

    async def health(request: Request) -> Response:
        return _said(Health())

    async def info(request: Request) -> Response:
        return _said(told)

    async def score_images(request: Request) -> Response:
        return _said(await desk.serve(request, desk.scored))

    async def check_prompts(request: Request) -> Response:
        return _said(await desk.serve(request, desk.checked))

    guarded = _guard(served.token)
    routes = [
        Route("/health", health),
        Route("/info", guarded(info)),
        Route("/score", guarded(score_images), methods=["POST"]),
        Route("/prompts", guarded(check_prompts), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={WireError: _refuse, HTTPException: _refuse})


Endpoint = Callable[[Request], Awaitable[Response]]


def _guard(token: str | None) -> Callable[[Endpoint], Endpoint]:
    """Lets in who knows the token."""
    known = holders_of(token)

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            if not known(request.headers.raw):
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                reason = "it is not the server's" if scheme.lower() == "bearer" and given else "there is none"
                message = f"This server wants its token as `Authorization: Bearer TOKEN`: {reason}."
                raise WireError(message, status=401, code="unauthorized")
            return await endpoint(request)

        return checked

    return guarded


class _Desk:
    """Where requests wait for the one reward."""

    def __init__(self, score: Score, served: Served, check: CheckPrompts | None) -> None:
        self.score, self.served, self.check = score, served, check
        self._waiting = 0
        self._bodies = Bodies(served.limits.max_body_bytes, served.read_timeout, READERS * served.max_waiting)
        self._decoded = asyncio.Semaphore(DECODED)
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reward")

    async def serve(self, request: Request, work: Callable[[bytes, str], Callable[[], Model]]) -> Model:
        """Read the body, let `work` decode it, and do what that returns in the reward's own thread."""
        self._check_room()
        # Only a body that is complete takes a place in the queue: slow ones keep nobody out.
        async with self._bodies.read(request) as body, self._place(), self._decoded:
            ready = await asyncio.to_thread(work, body, request.headers.get("content-type", ""))
            async with self._turn:
                # Whoever gave up and asks again elsewhere should not be computed twice.
                if await request.is_disconnected():
                    raise WireError("The client has gone.", status=408, code="gone")
                return await asyncio.get_running_loop().run_in_executor(self._worker, ready)

    def scored(self, body: bytes, media_type: str) -> Callable[[], Answer]:
        batch = decode(body, media_type, self.served.limits)
        if self.served.metadata and batch.metadata is None:
            message = f"The reward {self.served.reward!r} takes metadata: send, as `metadata`, the JSON of one object per image."
            raise WireError(message, status=422, code="schema")
        return partial(self._answer, batch)

    def checked(self, body: bytes, _: str) -> Callable[[], Checked]:
        prompts, metadata = decode_prompts(body)
        return partial(self._told, prompts, metadata)

    def _check_room(self) -> None:
        if self._waiting >= self.served.max_waiting:
            raise WireError(f"{self._waiting} requests are waiting; try again.", status=503, code="busy")

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        self._check_room()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _told(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Checked:
        try:
            if self.check is not None:
                self.check(prompts, metadata)
        except ValueError as error:
            return Checked(refusal=str(error))
        except BaseException as error:
            raise self._raised(error) from error
        return Checked()

    def _raised(self, error: BaseException) -> WireError:
        """What the reward's code raised, of any class: SystemExit would end this thread or the server, not the one request."""
        # What a client sent may be in there, and a log is read on a terminal.
        LOG.error("Reward %s failed\n%s", self.served.reward, plain_lines("".join(traceback.format_exception(error))))
        return _failed(f"Reward {self.served.reward!r} raised {type(error).__name__}: {error}")

    def _answer(self, batch: Batch) -> Answer:
        """One finite number per image, or status 500 with the reason."""
        known = (batch.metadata,) if self.served.metadata else ()
        try:
            values = np.asarray(self.score(as_float(batch.images), batch.prompts, *known))
        except BaseException as error:
            raise self._raised(error) from error
        if values.shape != (len(batch.images),) or values.dtype.kind != "f":
            shown = f"shape {values.shape} of {values.dtype}; return one float per image, shape ({len(batch.images)},)"
            raise _failed(f"Reward {self.served.reward!r} returned {shown}.")
        try:
            return Answer(reward_id=self.served.reward_id, rewards=values.tolist())
        except ValidationError:
            i = int(np.flatnonzero(~np.isfinite(values))[0])
            where = f"image {i}, prompt {batch.prompts[i]!r}"
            raise _failed(f"Reward {self.served.reward!r} is {values[i]} for {where}; it must be finite.") from None


def _failed(message: str) -> WireError:
    return WireError(message, status=500, code="reward_failed")


async def _refuse(request: Request, error: Exception) -> Response:
    """Every refusal in one form."""
    if isinstance(error, WireError):
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}, 408: {"Connection": "close"}}
        return _said(Failure(code=error.code, message=str(error)), error.status, headers.get(error.status))
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _said(Failure(code=f"http_{error.status_code}", message=message), error.status_code, error.headers)


def _said(reply: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(reply.model_dump_json(), status, headers, JSON_TYPE)
