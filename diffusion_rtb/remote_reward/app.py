"""The reward server's HTTP application; see `reward_wire` for the format. Needs the extra `server`.

Order of the checks: token, room in the queue, size while the body arrives, format, and only then the reward. One reward call
runs at a time, in one thread of its own: rewards need not be safe for threads, and a GPU is not shared by two batches.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jaxtyping import Float
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from diffusion_rtb import __version__
from diffusion_rtb.files.plain_text import plain_lines
from diffusion_rtb.remote_reward.bodies import Bodies
from diffusion_rtb.remote_reward.codec import Batch, as_float, decode, decode_prompts, encode
from diffusion_rtb.remote_reward.messages import (
    ENCODINGS,
    JSON_TYPE,
    NPZ_TYPE,
    Answer,
    Checked,
    Failure,
    Health,
    Info,
    Limits,
    Model,
    PixelsRequest,
    PngRequest,
    PromptsRequest,
    WireError,
)

__all__ = ["CheckPrompts", "Score", "Served", "create_app"]

LOG = logging.getLogger(__name__)

Score = Callable[..., Float[np.ndarray, " batch"]]
"""Images (batch, 3, height, width) in [0, 1], prompts and, where `Served.metadata`, a mapping each in; one number per image out.

It raises where there is none."""

CheckPrompts = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], None]
"""Prompts and their metadata; raises a ValueError where the reward does not take them."""

DECODED = 2
"""Requests whose pixels are in memory: one that is scored and one that is ready. The others wait as they came."""

READERS = 4
"""Bodies that may be arriving at one time for each that may wait."""

REFUSALS = {
    400: "The body is damaged",
    401: "The token is missing or wrong",
    408: "The body did not arrive in time",
    413: "More than the limits in /info",
    415: "The media type is not read here",
    422: "The body does not follow the schema",
    500: "The reward failed; asking again will not help",
    503: "Too many requests are waiting; try again",
}


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


def create_app(score: Score, served: Served, check: CheckPrompts | None = None) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        score: The reward. Its exceptions and numbers that are not finite are answered with status 500, never with a number.
        served: Names, limits and token.
        check: What the reward says to the prompts of a run; None: it takes all.
    """
    app = FastAPI(title="diffusion-rtb reward server", version=__version__, docs_url=None, redoc_url=None)
    desk = _Desk(score, served, check)
    guarded = [Depends(_Guard(served.token))] if served.token is not None else []
    refused = {status: {"model": Failure, "description": text} for status, text in REFUSALS.items()}
    without_token: dict[int | str, Any] = {401: refused[401]} if guarded else {}

    @app.get("/health")
    async def health() -> Health:
        return Health()

    @app.get("/info", dependencies=guarded, responses=without_token)
    async def info() -> Info:
        names = {"reward": served.reward, "reward_id": served.reward_id, "version": __version__}
        return Info(**names, **asdict(served.limits), encodings=list(ENCODINGS), metadata=served.metadata)

    @app.post(
        "/score",
        dependencies=guarded,
        response_model=Answer,
        responses={**{k: v for k, v in refused.items() if k != 401}, **without_token},
        openapi_extra=_described(served.limits),
    )
    async def score_images(request: Request) -> Response:
        answer = await desk.serve(request, desk.scored)
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)

    @app.post(
        "/prompts",
        dependencies=guarded,
        response_model=Checked,
        responses={**{k: v for k, v in refused.items() if k not in (401, 415)}, **without_token},
        openapi_extra=_json_body(PromptsRequest),
    )
    async def check_prompts(request: Request) -> Response:
        checked = await desk.serve(request, desk.checked)
        return Response(checked.model_dump_json(), media_type=JSON_TYPE)

    app.add_exception_handler(WireError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    return app


class _Guard(HTTPBearer):
    """Lets in who knows the token; the time it takes tells nothing about the token."""

    def __init__(self, token: str) -> None:
        super().__init__(auto_error=False, scheme_name="token")
        self._digest = sha256(token.encode()).digest()

    async def __call__(self, request: HTTPConnection) -> HTTPAuthorizationCredentials | None:
        found = await super().__call__(request)
        given = "" if found is None else found.credentials
        if not hmac.compare_digest(sha256(given.encode()).digest(), self._digest):
            reason = "there is none" if found is None else "it is not the server's"
            message = f"This server wants its token as `Authorization: Bearer TOKEN`: {reason}."
            raise WireError(message, status=401, code="unauthorized")
        return found


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
            values = np.asarray(self.score(as_float(batch.images), batch.prompts, *known), dtype=np.float64)
        except BaseException as error:
            raise self._raised(error) from error
        if values.shape != (len(batch.images),):
            raise _failed(
                f"Reward {self.served.reward!r} returned shape {values.shape} for {len(batch.images)} images."
            )
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
        failure = Failure(code=error.code, message=str(error))
        extra = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}, 408: {"Connection": "close"}}
        headers: Any = extra.get(error.status)
        return JSONResponse(failure.model_dump(), error.status, headers=headers)
    assert isinstance(error, HTTPException)
    failure = Failure(code=f"http_{error.status_code}", message=f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(failure.model_dump(), error.status_code, headers=error.headers)


def _json_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": model.model_json_schema()}}}}


def _described(limits: Limits) -> dict[str, Any]:
    """The request body for OpenAPI; the application reads it itself, as it arrives."""
    models: tuple[type[BaseModel], ...] = (PngRequest, PixelsRequest)
    forms = [model.model_json_schema() for model in models]
    # One black pixel, both ways.
    examples = {
        encoding: {"value": json.loads(encode(np.zeros((1, 3, 1, 1), np.float32), ["night"], encoding)[0])}
        for encoding in ("json_png", "json_uint8")
    }
    archive = {"type": "string", "format": "binary", "description": "images.npy and header.npy; no pickles"}
    content = {JSON_TYPE: {"schema": {"oneOf": forms}, "examples": examples}, NPZ_TYPE: {"schema": archive}}
    return {
        "requestBody": {
            "required": True,
            "content": content,
            "description": f"At most {limits.max_batch} images, {limits.max_pixels} pixels and {limits.max_body_bytes} bytes.",
        }
    }
