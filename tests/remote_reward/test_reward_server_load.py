"""A reward server under load on loopback: slow, half-open and greedy clients keep nobody out; memory is bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_rtb.remote_reward.app import Served, create_app
from diffusion_rtb.remote_reward.codec import encode
from diffusion_rtb.remote_reward.connections import Patience, guarded_protocol, holders_of
from diffusion_rtb.remote_reward.messages import JSON_TYPE, SAFETENSORS_TYPE, Limits
from diffusion_rtb.remote_reward.serve import Address, torch_score
from tests.oracles.serving import ask as plain_ask
from tests.oracles.serving import await_health, free_port, in_thread, start_process

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-enough-letters"
SCORE = encode(np.full((1, 3, 2, 2), 0.5, np.float32), ["a"], "safetensors")


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


@contextmanager
def serving(
    patience: Patience | None = None, token: str | None = TOKEN, score: Any = None, **settings: Any
) -> Iterator[str]:
    """As `serve` does, in a thread."""
    app = create_app(score or torch_score(brightness, "brightness", "cpu"), Served("b", "b-0", token=token, **settings))
    with in_thread(app, http=guarded_protocol(holders_of(token), patience)) as url:
        yield url


def connected(url: str, sent: bytes = b"") -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    peer.sendall(sent)
    return peer


def ask(method: str, url: str, path: str, body: Any = None, kind: str = JSON_TYPE, token: str | None = TOKEN) -> Any:
    headers = {"Content-Type": kind} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    return plain_ask(method, url, path, body, headers)


def scored(url: str, token: str | None = TOKEN) -> int:
    return int(ask("POST", url, "/score", *SCORE, token=token)[0])


def is_closed(peer: socket.socket, seconds: float) -> bool:
    """Whether the other side ends the connection within so many seconds, whatever it says before."""
    peer.settimeout(seconds)
    try:
        while peer.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def drips(peer: socket.socket, piece: bytes) -> float:
    """Seconds for which the other side takes a piece now and then; 10 if it never ends the connection."""
    start = time.monotonic()
    try:
        while time.monotonic() - start < 10:
            peer.sendall(piece)
            time.sleep(0.05)
    except OSError:
        pass
    return time.monotonic() - start


HEAD = (
    f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {SAFETENSORS_TYPE}\r\n".encode()
)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /he",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nx",
    ],
    ids=["nothing", "half a head", "health and rest", "a body without a token"],
)
def test_300_strangers_keep_nobody_out(sent: bytes) -> None:
    """Nine times what one server lets in beside its queue; the token's holder is served at once, before and after."""
    with serving() as url, ExitStack() as stack:
        kept = ask("GET", url, "/info")
        assert kept[0] == 200
        for _ in range(300):
            stack.enter_context(connected(url, sent))
        start = time.monotonic()
        for _ in range(5):
            assert scored(url) == 200
        assert time.monotonic() - start < 5


def test_who_has_shown_the_token_is_not_closed_for_strangers() -> None:
    with serving(Patience(strangers=8)) as url, ExitStack() as stack:
        known = stack.enter_context(connected(url, HEAD + b"Content-Length: 5\r\n\r\nPK"))
        kept = stack.enter_context(
            connected(url, f"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        )
        wrong = stack.enter_context(
            connected(url, b"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n")
        )
        assert b"401" in wrong.recv(4096)
        time.sleep(0.1)
        for _ in range(30):
            stack.enter_context(connected(url, b"GET"))
        assert is_closed(wrong, 2)
        kept.sendall(f"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        time.sleep(0.1)
        assert kept.recv(9999).count(b"200 OK") == 2
        known.sendall(b"abc")
        assert known.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_head_that_does_not_come_is_given_up(token: str | None) -> None:
    with serving(Patience(head=0.3), token=token) as url, ExitStack() as stack:
        silent, half = (stack.enter_context(connected(url, sent)) for sent in (b"", b"GET /he"))
        dripping = stack.enter_context(connected(url, b"GET /health HTTP/1.1\r\n"))
        assert 0.2 < drips(dripping, b"a: b\r\n") < 3
        assert is_closed(silent, 2)
        assert is_closed(half, 2)
        # A kept connection may rest between requests, but not within the head of its next one.
        kept = stack.enter_context(connected(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert not is_closed(kept, 0.6)
        kept.sendall(b"GET /hea")
        assert is_closed(kept, 2)


def test_a_refused_body_does_not_hold_its_connection() -> None:
    sent = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\nx"
    with serving(Patience(rest=0.2)) as url, connected(url, sent) as peer:
        assert b"401" in peer.recv(4096).split(b"\r\n")[0]
        assert drips(peer, b"x") < 3


def test_slow_bodies_with_the_token_leave_the_queue_free() -> None:
    with serving(max_waiting=4) as url, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connected(url, HEAD + b"Content-Length: 99\r\n\r\nPK"))
        time.sleep(0.1)
        start = time.monotonic()
        assert scored(url) == 200
        assert time.monotonic() - start < 2
        for _ in range(8):
            stack.enter_context(connected(url, HEAD + b"Content-Length: 99\r\n\r\nPK"))
        time.sleep(0.1)
        assert scored(url) == 503


def test_a_dripping_body_is_given_up_after_seconds() -> None:
    with serving(read_timeout=600.0) as url, connected(url, HEAD + b"Content-Length: 100000\r\n\r\n") as peer:
        start = time.monotonic()
        said = b""
        peer.settimeout(0.2)
        while time.monotonic() - start < 15 and not said:
            peer.sendall(b"x" * 100)
            try:
                said = peer.recv(4096)
            except TimeoutError:
                continue
        with suppress(OSError):
            while part := peer.recv(4096):
                said += part
        assert b"408" in said.split(b"\r\n")[0]
        assert b"less than 64 KiB/s" in said
        assert time.monotonic() - start < 10


def test_all_bodies_together_are_bounded() -> None:
    limits = Limits(max_body_bytes=10_000)
    with serving(limits=limits) as url, ExitStack() as stack:
        held = [
            stack.enter_context(connected(url, HEAD + b"Content-Length: 10000\r\n\r\n" + b"x" * 9_990))
            for _ in range(8)
        ]
        time.sleep(0.2)
        assert scored(url) == 503
        held[0].close()
        time.sleep(0.2)
        assert scored(url) == 200


def black(side: int) -> bytes:
    """A PNG of black pixels; its size on the wire is a thousandth of that in memory."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    lines = zlib.compress(bytes((3 * side + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def test_pixels_are_counted_before_they_are_decoded_and_few_are_held() -> None:
    """The peak of a server of its own, asked by 4 clients at once for the largest pictures that it takes, and larger ones."""
    port = free_port()
    process = start_process({"component": "brightness"}, port, TOKEN)
    try:
        await_health(port)
        url = f"http://127.0.0.1:{port}"

        def request(side: int) -> int:
            body = {
                "schema_version": 2,
                "prompts": ["a"],
                "images": [base64.b64encode(black(side)).decode()],
            }
            return int(ask("POST", url, "/score", json.dumps(body).encode(), JSON_TYPE)[0])

        def peak() -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]

        assert scored(url) == 200
        before = peak()
        assert request(8192) == 413
        assert peak() - before < 20
        side = int(Limits().max_pixels ** 0.5)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(request, [side] * 4)) <= {200}
        # uint8 of two requests, and one of them as float32 twice: 16 bytes and a little per pixel and channel.
        assert peak() - before < 900
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("leaving", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_a_reward_that_tries_to_end_the_program_is_a_failure(leaving: type[BaseException]) -> None:
    calls = []

    def score(images: Any, prompts: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise leaving(3)
        return np.zeros(len(images))

    with serving(score=score) as url:
        status, failure, _ = ask("POST", url, "/score", *SCORE)
        assert (status, failure["code"]) == (500, "reward_failed")
        assert f"raised {leaving.__name__}" in failure["message"]
        assert scored(url) == 200


def test_the_example_of_the_help_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_rtb.cli.main import main

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve-reward", "--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "DIFFUSION_RTB_TOKEN=" in line)
    command = line.strip(" │")
    assert command.startswith("export DIFFUSION_RTB_TOKEN=")
    token = subprocess.run(
        ["sh", "-c", f"{command}; echo $DIFFUSION_RTB_TOKEN"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Address("0.0.0.0", 8817, token.stdout.strip()).token
