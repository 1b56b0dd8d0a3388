"""Bodies of requests while they arrive: what all of them hold together, and how slowly one may come, is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from diffusion_rtb.remote_reward.messages import WireError

__all__ = ["Bodies"]

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
