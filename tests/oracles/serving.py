"""Reward servers for tests: real HTTP on loopback, in a thread, in a process, and hostile ones made of sockets."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn

from diffusion_rtb.remote_reward.messages import SCHEMA_VERSION

ROOT = Path(__file__).parents[2]
INFO: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "version": "0.1.0",
    "reward": "planted",
    "reward_id": "planted-0",
    "encodings": ["safetensors"],
    "max_batch": 8,
    "max_body_bytes": 10_000_000,
    "max_pixels": 10_000_000,
    "metadata": False,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def in_thread(app: Any, port: int | None = None, **options: Any) -> Iterator[str]:
    """A uvicorn server of this process; yields its address."""
    port = port or free_port()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=port,
            lifespan="off",
            log_level="error",
            timeout_graceful_shutdown=1,
            **{"http": "h11", **options},
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"{'https' if 'ssl_certfile' in options else 'http'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def start_process(component: Mapping[str, Any], port: int, token: str | None = None) -> subprocess.Popen[bytes]:
    """A server of its own, as `serve-reward` starts it."""
    code = (
        "import json, sys\n"
        "from diffusion_rtb.remote_reward.serve import Address, serve\n"
        "serve(json.loads(sys.argv[1]), Address(port=int(sys.argv[2]), token=sys.argv[3] or None))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(dict(component)), str(port), token or ""],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def await_health(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if ask("GET", f"http://127.0.0.1:{port}", "/health")[0] == 200:
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def ask(
    method: str, url: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    """One request by the standard library: status, JSON, headers."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        response = connection.getresponse()
        content = response.read()
        return response.status, dict(json.loads(content or b"{}")), response.headers
    finally:
        connection.close()


Said = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]


@contextmanager
def answering(score: Callable[[bytes], Said], info: Mapping[str, Any] = INFO) -> Iterator[str]:
    """A server that says to POST /score whatever `score` returns for the body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(200, json.dumps(dict(info)).encode())

        def do_POST(self) -> None:
            self._say(*score(self.rfile.read(int(self.headers["Content-Length"]))))

        def _say(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does `talk` with every connection, HTTP or not."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def one(peer: socket.socket) -> None:
        with peer:
            try:
                talk(peer)
            except OSError:
                return

    def accept() -> None:
        while not stopped.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        listener.close()
