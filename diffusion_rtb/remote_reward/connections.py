"""Connections to a reward server and the bodies that arrive on them: nobody can keep others out by holding them.

uvicorn waits for the head of a request without end, and counts such connections among those that are too many. Here a head has
some seconds; a connection on which no valid token was seen yet is a *stranger*, of whom only a number stay: one more closes the
oldest. So whoever has the token always finds room, whatever others hold open. What all bodies hold together, and how slowly one
may come, is bounded too. Needs the extra `server`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import h11
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffusion_rtb.remote_reward.messages import WireError

__all__ = ["Bodies", "Patience", "guarded_protocol", "holders_of"]

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Patience:
    """How long and for how many connections a server waits."""

    head: float = 10.0
    """Seconds for the head of a request, from when the connection opens or, on a kept one, from its first byte."""
    rest: float = 1.0
    """Seconds in which a request that was answered before its body was complete may still be heard why."""
    strangers: int = 64
    """Connections at one time that have not shown a valid token."""


@dataclass
class _Doors:
    """What the connections of one server share."""

    patience: Patience
    known: Callable[[Headers], bool]
    strangers: dict[_Guarded, None] = field(default_factory=dict)
    """In the order in which they came."""

    def enter(self, newcomer: _Guarded) -> None:
        self.strangers[newcomer] = None
        while len(self.strangers) > self.patience.strangers:
            oldest = next(iter(self.strangers))
            self.leave(oldest)
            oldest.transport.abort()

    def leave(self, connection: _Guarded) -> None:
        self.strangers.pop(connection, None)


class _Guarded(H11Protocol):
    """One connection."""

    doors: _Doors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock: asyncio.TimerHandle | None = None
        self._answered: Any = None
        """The scope of the request that was looked at last."""

    def connection_made(self, transport: Any) -> None:
        """Let it in as a stranger and wait for its head."""
        super().connection_made(transport)
        self.doors.enter(self)
        self._await(self.doors.patience.head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing waits for it any more."""
        self.doors.leave(self)
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and see whether a head is complete or has begun."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """A kept connection may rest; one whose body still comes after the answer may not."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._stop()
            self._await(self.doors.patience.rest)
        else:
            self._look()

    def _look(self) -> None:
        if self.scope is not None and self.scope is not self._answered:
            self._answered = self.scope
            self._stop()
            if self.doors.known(self.headers):
                self.doors.leave(self)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun and self._clock is None:
            self._await(self.doors.patience.head)

    def _await(self, seconds: float) -> None:
        self._clock = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


HELD = 8
"""Bodies of the largest size that all requests together may hold."""

SLOWEST, GRACE = 64 * 1024, 5.0
"""Bytes per second at least, on average and after some seconds: below it a sender only keeps others out."""


class Bodies:
    """Reads the bodies of a server's requests.

    Args:
        most: Bytes of one body.
        seconds: For one body to arrive.
        readers: Bodies that may be arriving at one time.
    """

    def __init__(self, most: int, seconds: float, readers: int) -> None:
        self._most, self._seconds, self._free = most, seconds, readers
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body; its bytes count as held until the block ends.

        Raises:
            WireError: it is too long (413), too slow or its sender has gone (408), or there is no room for it (503).
        """
        if self._free < 1:
            raise _busy("too many requests are arriving")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._most:
            raise self._too_long()
        body = bytearray()
        try:
            await self._fill(body, request)
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        loop, stream = asyncio.get_running_loop(), aiter(request.stream())
        start = loop.time()
        self._free -= 1
        try:
            while True:
                allowed = min(self._seconds, GRACE + len(body) / SLOWEST)
                async with asyncio.timeout_at(start + allowed):
                    chunk = await anext(stream, None)
                if chunk is None:
                    return
                if len(body) + len(chunk) > self._most:
                    raise self._too_long()
                if self._held + len(chunk) > HELD * self._most:
                    raise _busy("the requests that are waiting fill the memory set aside for them")
                body += chunk
                self._held += len(chunk)
        except TimeoutError:
            slow = f"; it comes at less than {SLOWEST // 1024} KiB/s" if allowed < self._seconds else ""
            message = f"The body did not arrive within {allowed:.3g} s{slow}."
            raise WireError(message, status=408, code="timeout") from None
        except ClientDisconnect:
            raise WireError("The client left before its body was complete.", status=408, code="gone") from None
        finally:
            self._free += 1

    def _too_long(self) -> WireError:
        return WireError(
            f"The body is above max_body_bytes={self._most}: send fewer images.", status=413, code="too_large"
        )


def _busy(why: str) -> WireError:
    return WireError(f"{why[0].upper()}{why[1:]}; try again.", status=503, code="busy")


def holders_of(token: str | None) -> Callable[[Headers], bool]:
    """Do headers show this token? The time it takes tells nothing about it. Without a token everybody is known."""
    if token is None:
        return lambda _: True
    digest = sha256(token.encode()).digest()

    def known(headers: Headers) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, rest = given.partition(b" ")
        return hmac.compare_digest(sha256(rest.strip()).digest(), digest) and scheme.lower() == b"bearer"

    return known


def guarded_protocol(known: Callable[[Headers], bool], patience: Patience | None = None) -> type[asyncio.Protocol]:
    """For uvicorn's option `http`.

    Args:
        known: Do the headers of a request, names in lower case, show that its sender may use the server?
        patience: Seconds and numbers; None: the defaults.
    """

    class Guarded(_Guarded):
        doors = _Doors(patience or Patience(), known)

    return Guarded
