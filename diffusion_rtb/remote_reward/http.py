"""One HTTP exchange with a reward server: kept-alive connections, one deadline for the whole exchange, bounded answers.

Proxy variables of the environment are ignored and redirects not followed: images and the token go where the config says and
nowhere else.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from urllib3 import connection_from_url
from urllib3.exceptions import HTTPError

__all__ = ["Endpoint", "Reply", "check_url"]

MOST_BYTES = 8 * 2**20
"""Of an answer: a hundred thousand rewards and more."""

USED = threading.local()
"""`late` and `socket` of a thread's exchange: whether its deadline has passed, and what it is on."""


@dataclass(frozen=True)
class Reply:
    """What a server said."""

    status: int
    content: bytes
    retry_after: float | None = None
    """Seconds that the server asks to wait."""


def check_url(url: str) -> str:
    """The base address of a server without a trailing slash.

    Raises:
        ValueError: it is not of the form http://HOST:PORT or https://HOST:PORT, with or without a path.
    """
    remedy = "write http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"Server {url!r}: {error}; {remedy}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in url):
        raise ValueError(f"Server {url!r} is not an address: {remedy}.")
    if parts.query or parts.fragment or parts.username is not None or port == 0:
        raise ValueError(
            f"Server {url!r}: {remedy}, without user name, query or port 0; a token comes from the environment."
        )
    return url.rstrip("/")


class Endpoint:
    """One server.

    Args:
        url: Its base address.
        timeout: Seconds for one exchange, from connecting to the last byte of the answer.
        headers: Sent with every request.
    """

    def __init__(self, url: str, *, timeout: float, headers: dict[str, str]) -> None:
        self.url = check_url(url)
        self.timeout = timeout
        self.headers = headers
        self._pool: Any = connection_from_url(self.url, maxsize=8, timeout=timeout, retries=False)
        self._pool.ConnectionCls = type("Connection", (_Known, self._pool.ConnectionCls), {})

    def exchange(self, method: str, path: str, body: bytes | None = None, media_type: str | None = None) -> Reply:
        """Send one request and read its answer; may be called from several threads.

        Raises:
            TimeoutError: the deadline passed.
            OSError, http.client.HTTPException, urllib3 HTTPError: the server cannot be reached, or the connection broke.
        """
        headers = self.headers | ({} if media_type is None else {"Content-Type": media_type})
        # A socket's own timeout starts anew with every byte: a server that drips would never run into it.
        late = USED.late = threading.Event()
        USED.socket = None
        watchdog = threading.Timer(self.timeout, _cut, (USED.__dict__,))
        watchdog.daemon = True
        watchdog.start()
        target, response = urlsplit(self.url).path + path, None
        try:
            response = self._pool.urlopen(method, target, body, headers, redirect=False, preload_content=False)
            content = response.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise HTTPError(f"the answer has more than {MOST_BYTES} bytes")
            if late.is_set():
                raise TimeoutError
        except (OSError, HTTPError) as error:
            if response is not None:
                response.close()
            cause = error.__cause__ or next((part for part in error.args if isinstance(part, Exception)), error)
            if late.is_set() or isinstance(cause, TimeoutError):
                raise TimeoutError(f"no complete answer within {self.timeout:g} s") from error
            raise cause from None
        finally:
            watchdog.cancel()
        return Reply(response.status, content, _seconds(response.headers.get("Retry-After")))

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()


class _Known:
    """A connection of urllib3's whose socket the thread's exchange knows."""

    sock: socket.socket | None

    def request(self, *args: Any, **options: Any) -> None:
        USED.socket = self.sock  # a kept connection has one
        try:
            super().request(*args, **options)  # type: ignore[misc]
        except ConnectionResetError:
            # A server may answer and stop reading before it has the whole body, e.g. to refuse its size: hear why.
            if self.sock is None:
                raise
        USED.socket = self.sock
        if USED.late.is_set():  # while there was no socket to cut
            raise TimeoutError


def _cut(used: dict[str, Any]) -> None:
    used["late"].set()
    with suppress(OSError, AttributeError):  # closed already, or not connected
        used["socket"].shutdown(socket.SHUT_RDWR)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is not used between programs."""
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 6 else None
