"""One HTTP exchange with a reward server: kept-alive connections, one deadline for the whole exchange, bounded answers.

Only the standard library is used. Proxy variables of the environment are ignored and redirects not followed: images and the
token go where the config says and nowhere else.
"""

from __future__ import annotations

import http.client
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit

__all__ = ["Endpoint", "Reply", "check_url"]

MOST_BYTES = 8 * 2**20
"""Of an answer: a hundred thousand rewards and more."""

STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
"""What a kept-alive connection that the server has closed in the meantime looks like."""


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
        self._parts = urlsplit(self.url)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def exchange(self, method: str, path: str, body: bytes | None = None, media_type: str | None = None) -> Reply:
        """Send one request and read its answer; may be called from several threads.

        Raises:
            TimeoutError: the deadline passed.
            OSError, http.client.HTTPException: the server cannot be reached, or the connection broke.
        """
        deadline = monotonic() + self.timeout
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._on(connection, deadline, method, path, body, media_type)
            except STALE:  # scoring has no side effects, so asking again is harmless
                connection.close()
        return self._on(self._connect(deadline), deadline, method, path, body, media_type)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=max(deadline - monotonic(), 0.01))
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _on(
        self,
        connection: http.client.HTTPConnection,
        deadline: float,
        method: str,
        path: str,
        body: bytes | None,
        media_type: str | None,
    ) -> Reply:
        headers = self.headers | ({} if media_type is None else {"Content-Type": media_type})
        left = max(deadline - monotonic(), 0.01)
        # A socket's own timeout starts anew with every byte: a server that drips would never run into it.
        late = threading.Event()
        watchdog = threading.Timer(left, _cut, (connection.sock, late))
        watchdog.daemon = True
        watchdog.start()
        connection.sock.settimeout(left)
        kept = False
        try:
            _send(connection, method, self._parts.path + path, body, headers)
            response = connection.getresponse()
            content = response.read(MOST_BYTES + 1)
            if late.is_set():
                raise TimeoutError
            if len(content) > MOST_BYTES:
                raise http.client.HTTPException(f"the answer has more than {MOST_BYTES} bytes")
            if response.length:  # read(size) is silent about an answer that ends too early
                raise http.client.IncompleteRead(content, response.length)
            kept = not response.will_close and response.isclosed()
            return Reply(response.status, content, _seconds(response.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise TimeoutError(f"no complete answer within {self.timeout:g} s") from error
            raise
        finally:
            watchdog.cancel()
            if kept:
                with self._lock:
                    self._idle.append(connection)
            else:
                connection.close()


def _send(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    try:
        connection.request(method, path, body=body, headers=headers)
    except (BrokenPipeError, ConnectionResetError):
        # A server may answer and stop reading before it has the whole body, e.g. to refuse its size: hear why.
        if not body or connection.sock is None:
            raise


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is not used between programs."""
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 6 else None
