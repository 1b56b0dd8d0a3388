"""The reward `remote`: the numbers of the servers, or an error; never a number that nobody computed."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import RunConfig, config_text
from diffusion_rtb.remote_reward.app import Served, create_app
from diffusion_rtb.remote_reward.client import RemoteRewardError
from diffusion_rtb.remote_reward.codec import decode
from diffusion_rtb.remote_reward.http import Endpoint
from diffusion_rtb.remote_reward.messages import ENCODINGS, SAFETENSORS_TYPE, Encoding, Limits
from diffusion_rtb.remote_reward.serve import reward_id, torch_score
from diffusion_rtb.run.checkpoint import latest_checkpoint
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from diffusion_rtb.training.assemble import assemble
from rewards.jpeg import Jpeg
from rewards.remote import Remote
from tests.oracles.serving import INFO, answering, await_health, free_port, in_thread, start_process, talking
from tests.oracles.tiny import save_tiny

QUICK: dict[str, Any] = {"backoff": 0.01, "max_backoff": 0.05}
TOKEN = "correct-horse-battery"


def some_images(count: int = 5, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def app(reward: Any = brightness, **served: Any) -> Any:
    return create_app(torch_score(reward, "mine", "cpu"), Served("mine", "mine-0", **served))


def answer(rewards: Any, **changes: Any) -> bytes:
    return json.dumps({"schema_version": 2, "reward_id": "planted-0", "rewards": rewards} | changes).encode()


def brightnesses(body: bytes) -> tuple[int, bytes]:
    """What a correct planted server says."""
    return 200, answer(decode(body, SAFETENSORS_TYPE, Limits()).images.reshape(-1, 192).mean(1).tolist())


def test_remote_is_local_to_the_last_bit() -> None:
    images, prompts = some_images(7, 12), [f"a « {i} »\n\0" for i in range(7)]

    def of_both(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).sin().sum(1) + torch.tensor([float(prompt[4]) / 3 for prompt in prompts])

    with in_thread(app(of_both)) as url:
        assert torch.equal(Remote(url)(images, prompts), of_both(images, prompts))


@pytest.mark.parametrize("encoding", [encoding for encoding in ENCODINGS if encoding != "safetensors"])
def test_eight_bits_cost_up_to_half_a_step(encoding: Encoding) -> None:
    images = some_images(6)
    with in_thread(app()) as url:
        values = Remote(url, encoding=encoding)(images, ["a"] * 6)
    torch.testing.assert_close(values, brightness((images * 255).round() / 255, []), rtol=0, atol=1e-6)
    assert not torch.equal(values, brightness(images, []))
    assert (values - brightness(images, [])).abs().max() <= 1 / 510


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts_are_understood(dtype: torch.dtype) -> None:
    images = some_images(4).to(dtype).to(memory_format=torch.channels_last)
    before = images.clone()
    with in_thread(app()) as url:
        values = evaluate_reward(Remote(url), images, list("abcd"), "remote")
    assert torch.equal(values, brightness(images.float().contiguous(), []))
    assert torch.equal(images, before)


def test_no_images_ask_nobody() -> None:
    with in_thread(app()) as url:
        reward = Remote(url)
        reward.load_weights()
    assert reward(some_images(0), []).shape == (0,)


@settings(max_examples=6, deadline=None)
@given(
    count=st.integers(1, 23),
    batch=st.none() | st.integers(1, 9),
    limits=st.builds(Limits, max_batch=st.integers(1, 9), max_pixels=st.integers(64, 500)),
    bytes_of=st.sampled_from([3_000, 9_000, 10**6]),
    encoding=st.sampled_from(ENCODINGS),
)
def test_batches_are_cut_to_the_servers_limits_and_keep_their_order(
    count: int, batch: int | None, limits: Limits, bytes_of: int, encoding: Encoding
) -> None:
    limits = Limits(limits.max_batch, bytes_of, limits.max_pixels)
    sizes: list[int] = []

    def seen(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(prompts))
        return torch.tensor([float(prompt) for prompt in prompts])

    with in_thread(app(seen, limits=limits)) as a, in_thread(app(seen, limits=limits)) as b:
        values = Remote([a, b], batch=batch, encoding=encoding)(some_images(count), [str(i) for i in range(count)])
    assert values.tolist() == list(range(count))
    assert sum(sizes) == count
    assert max(sizes) <= min(limits.max_batch, batch or 99, limits.max_pixels // 64)


def test_servers_take_turns() -> None:
    calls = {"a": 0, "b": 0, "c": 0}

    def counted(name: str) -> Any:
        def score(body: bytes) -> tuple[int, bytes]:
            calls[name] += 1
            return brightnesses(body)

        return score

    with answering(counted("a")) as a, answering(counted("b")) as b, answering(counted("c")) as c:
        reward = Remote([a, b, c])
        for _ in range(4):  # one image is one request
            reward(some_images(1), ["x"])
        assert sorted(calls.values()) == [1, 1, 2]
        images = some_images(6)
        torch.testing.assert_close(reward(images, ["x"] * 6), brightness(images, []))
        assert sorted(calls.values()) == [2, 2, 3]


def test_only_images_are_sent() -> None:
    with in_thread(app()) as url:
        reward = Remote(url)
        for shape in ((2, 5), (2, 4, 8, 8), (2, 8, 8)):
            with pytest.raises(ValueError, match=r"remote sends images of shape \(batch, 3, height, width\), got"):
                reward(torch.zeros(shape), ["a", "b"])


SIZED = INFO | {"max_batch": 1}


@pytest.mark.parametrize(
    "said, expected",
    [
        ((200, b""), "answer that cannot be used: answer: .*EOF"),
        ((200, b"\x80\x04]\x94."), "cannot be used"),
        ((200, b"<html>proxy</html>"), "cannot be used"),
        ((200, b"{}"), "reward_id: Field required; rewards: Field required"),
        ((200, b"[0.5]"), "cannot be used"),
        ((200, answer([0.5], schema_version=1)), "this side speaks schema version 2, the other 1"),
        ((200, answer([0.5], reward_id="other-1")), "now serves 'other-1'; this run began with 'planted-0'"),
        ((200, answer([])), "answered with 0 rewards for 1 images"),
        ((200, answer([0.5, 0.5])), "answered with 2 rewards for 1 images"),
        ((200, answer(0.5)), "rewards: Input should be a valid array, got 0.5"),
        ((200, answer([[0.5]])), r"rewards\.0: Input should be a valid number"),
        ((200, answer([None])), r"rewards\.0: Input should be a valid number"),
        ((200, answer(["high"])), r"rewards\.0: Input should be a valid number"),
        ((200, answer([float("nan")])), r"rewards\.0: Input should be a finite number, got nan"),
        ((200, answer([float("-inf")])), r"rewards\.0: Input should be a finite number, got -inf"),
        ((200, answer([0.5]).replace(b"0.5", b"1e999")), r"rewards\.0: Input should be a finite number, got inf"),
        ((200, answer([1e300])), "beyond the range of float32"),
        ((204, b""), "refused: status 204"),
        ((301, b"", {"Location": "http://127.0.0.1:9/"}), "refused: status 301"),
        ((401, b'{"schema_version": 2, "code": "unauthorized", "message": "who?"}'), r"401 \(unauthorized\): who\?"),
        ((404, b"nothing here"), 'status 404: "nothing here"'),
        (
            (500, b'{"schema_version": 2, "code": "reward_failed", "message": "is nan"}'),
            r"500 \(reward_failed\): is nan",
        ),
    ],
)
def test_an_answer_that_is_none_is_final(said: Any, expected: str) -> None:
    asked = []

    def score(body: bytes) -> Any:
        asked.append(body)
        return said

    with answering(score, SIZED) as url:
        reward = Remote(url, **QUICK)
        with pytest.raises(RewardError, match=f"raised RemoteRewardError: .*{expected}") as error:
            evaluate_reward(reward, some_images(1), ["a"], "remote")
    assert isinstance(error.value.__cause__, RemoteRewardError)
    assert len(asked) == 1, "asked again although it could not help"


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {
            "schema_version": st.sampled_from([2, 2, 2, 1, "2", None]),
            "reward_id": st.sampled_from(["planted-0", "planted-0", "other", 0]),
            "rewards": st.lists(st.floats() | st.integers() | st.text(max_size=3) | st.none(), max_size=4),
        }
    ).map(lambda value: json.dumps(value).encode()),
    status=st.sampled_from([200, 200, 200, 201, 400, 418, 500]),
)
def test_whatever_a_server_says_becomes_an_error_or_its_own_numbers(
    planted: tuple[Remote, dict[str, Any]], content: bytes, status: int
) -> None:
    reward, said = planted
    said["next"] = (status, content)
    try:
        values = reward(some_images(2), ["a", "b"])
    except RemoteRewardError:
        return
    assert status == 200
    told = json.loads(content)
    assert told["reward_id"] == "planted-0"
    assert values.tolist() == pytest.approx([float(value) for value in told["rewards"]], rel=1e-6)
    assert torch.isfinite(values).all()


@pytest.fixture(scope="module")
def planted() -> Any:
    said: dict[str, Any] = {}
    with answering(lambda body: said["next"]) as url:
        yield Remote(url, retries=0), said


def test_info_that_is_none_is_refused() -> None:
    for info, expected in [
        ({}, "version: Field required"),
        (INFO | {"max_batch": 0}, "max_batch: Input should be greater than or equal to 1"),
        (INFO | {"schema_version": 1}, "speaks schema version 2, the other 1; use matching versions of diffusion-rtb"),
        (INFO | {"schema_version": 9}, "speaks schema version 2, the other 9"),
    ]:
        with answering(brightnesses, info) as url, pytest.raises(RemoteRewardError, match=expected):
            Remote(url).load_weights()
    with answering(brightnesses, INFO | {"something": "new"}) as url:
        Remote(url).load_weights()


def test_servers_of_different_rewards_are_not_mixed() -> None:
    others = INFO | {"reward_id": "other-1"}
    with (
        answering(brightnesses) as a,
        answering(brightnesses, others) as b,
        pytest.raises(RemoteRewardError, match=r"The servers serve different rewards: .*'planted-0'.*'other-1'"),
    ):
        Remote([a, b]).load_weights()


def test_what_passes_is_tried_again(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [(503, b"busy"), (502, b""), (429, b""), (504, b""), (408, b"")]

    def score(body: bytes) -> Any:
        return left.pop() if left else brightnesses(body)

    state = torch.get_rng_state()
    for draw in ("uniform", "random"):  # pauses are varied, but not by the random numbers of the run
        monkeypatch.setattr(random, draw, None)
    images = torch.full((1, 3, 8, 8), 0.25)
    with answering(score) as url, caplog.at_level(logging.WARNING):
        assert Remote(url, **QUICK)(images, ["a"]).tolist() == [0.25]
    assert len(caplog.records) == 5
    assert "retry 5 of 8" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_tries_are_counted_and_pauses_grow() -> None:
    times: list[float] = []

    def score(body: bytes) -> tuple[int, bytes]:
        times.append(time.monotonic())
        return 503, b"no"

    with answering(score) as url:
        reward = Remote(url, retries=4, backoff=0.05, max_backoff=0.2)
        with pytest.raises(RemoteRewardError, match=r"in 5 tries over \d s\. .*status 503: \"no\".*serve-reward"):
            reward(some_images(1), ["a"])
    pauses = np.diff(times)
    lower, upper = np.array([0.025, 0.05, 0.1, 0.2]), np.array([0.075, 0.15, 0.2, 0.2])
    assert (pauses >= lower).all()
    assert (pauses <= upper + 0.15).all(), "the rest is the machine's"


def test_a_server_may_ask_for_more_time() -> None:
    times: list[float] = []

    def score(body: bytes) -> Any:
        times.append(time.monotonic())
        return (503, b"", {"Retry-After": "1"}) if len(times) == 1 else brightnesses(body)

    with answering(score) as url:
        Remote(url, backoff=0.01, max_backoff=0.3)(some_images(1), ["a"])
    assert 0.3 <= times[1] - times[0] < 0.9, "as asked, but not beyond max_backoff"


def dripping(peer: socket.socket) -> None:
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        peer.sendall(b" ")
        time.sleep(0.02)


def dripping_headers(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nX-A: ")
    while True:
        peer.sendall(b"a")
        time.sleep(0.02)


def silent(peer: socket.socket) -> None:
    while peer.recv(65536):
        pass


def closing(peer: socket.socket) -> None:
    peer.recv(65536)


def truncated(peer: socket.socket) -> None:
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + json.dumps(INFO).encode())


def endless(peer: socket.socket) -> None:
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        peer.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def not_http(peer: socket.socket) -> None:
    peer.sendall(b"220 mail.example.org ESMTP\r\n")


@pytest.mark.parametrize(
    "talk, expected",
    [
        (dripping, "TimeoutError: no complete answer within 0.3 s"),
        (dripping_headers, "TimeoutError: no complete answer within 0.3 s"),
        (silent, "TimeoutError: no complete answer within 0.3 s"),
        (closing, "RemoteDisconnected|ConnectionResetError"),
        (truncated, r"IncompleteRead\("),
        (endless, "more than 8388608 bytes|no complete answer"),
        (not_http, "BadStatusLine|ConnectionResetError"),
    ],
)
def test_a_server_that_misbehaves_holds_nobody_up(talk: Callable[[socket.socket], None], expected: str) -> None:
    start = time.monotonic()
    with (
        talking(talk) as url,
        pytest.raises(RemoteRewardError, match=f"No reward server answered in 2 tries.*({expected})"),
    ):
        Remote(url, timeout=0.3, retries=1, **QUICK).load_weights()
    assert time.monotonic() - start < 2


def test_a_server_that_does_not_read_holds_nobody_up() -> None:
    start = time.monotonic()
    with talking(lambda peer: time.sleep(1)) as url, pytest.raises(TimeoutError, match=r"answer within 0\.3 s"):
        Endpoint(url, timeout=0.3, headers={}).exchange("POST", "/score", bytes(2**25))
    assert time.monotonic() - start < 2


def test_a_deadline_that_passes_before_there_is_a_socket_holds() -> None:
    """Connecting took all of the time; then the server answers without end."""
    with talking(dripping) as url:
        endpoint = Endpoint(url, timeout=0.3, headers={})
        connect = endpoint._pool.ConnectionCls.connect

        def slow(connection: Any) -> None:
            time.sleep(0.4)
            connect(connection)

        endpoint._pool.ConnectionCls.connect = slow
        with pytest.raises(TimeoutError, match=r"answer within 0\.3 s"):
            endpoint.exchange("GET", "/info")


def test_a_port_where_nobody_listens() -> None:
    with pytest.raises(
        RemoteRewardError, match=r"ConnectionRefusedError.*Is `diffusion-rtb serve-reward` running there\?"
    ):
        Remote(f"http://127.0.0.1:{free_port()}", retries=2, **QUICK).load_weights()


def test_one_server_of_two_is_enough() -> None:
    with answering(brightnesses) as a:
        with answering(brightnesses) as b:
            reward = Remote([a, b])
            reward.load_weights()
        images = some_images(16)
        start = time.monotonic()
        for _ in range(5):
            torch.testing.assert_close(reward(images, ["x"] * 16), brightness(images, []))
        # With the other one at hand there is nothing to wait for.
        assert time.monotonic() - start < 0.5


def test_the_first_failure_for_good_ends_the_batch() -> None:
    def score(body: bytes) -> tuple[int, bytes]:
        batch = decode(body, SAFETENSORS_TYPE, Limits())
        return (500, b"broken image") if "bad" in batch.prompts else (503, b"later")

    with answering(score, SIZED) as a, answering(score, SIZED) as b:
        reward = Remote([a, b], backoff=5.0)
        start = time.monotonic()
        with pytest.raises(RemoteRewardError, match="broken image"):
            reward(some_images(4), ["good", "bad", "good", "good"])
        assert time.monotonic() - start < 2


def test_a_server_that_restarts_between_calls_is_found_again() -> None:
    port = free_port()
    with in_thread(app(), port) as url:
        reward = Remote(url, **QUICK)
        images = some_images(3)
        first = reward(images, ["a"] * 3)
    with in_thread(app(), port):
        assert torch.equal(reward(images, ["a"] * 3), first)


def test_a_killed_server_is_waited_for() -> None:
    """kill -9 while requests are under way, start again: every image still gets its own number."""
    port, component = free_port(), {"component": "jpeg", "quality": 50}
    server = start_process(component, port)
    try:
        await_health(port)
        reward = Remote(f"http://127.0.0.1:{port}", retries=100, backoff=0.1, max_backoff=2.0)
        restarted: list[subprocess.Popen[bytes]] = []

        def restart() -> None:
            time.sleep(0.3)
            server.send_signal(signal.SIGKILL)
            server.wait()
            restarted.append(start_process(component, port))

        thread = threading.Thread(target=restart)
        thread.start()
        local, done = Jpeg(quality=50), 0
        while thread.is_alive() or done < 20:
            images = some_images(8, 32)
            assert torch.equal(reward(images, ["a"] * 8), local(images, ["a"] * 8))
            done += 1
        thread.join()
    finally:
        for process in (server, *restarted):
            process.kill()
            process.wait()


def test_a_token_opens_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_thread(app(token=TOKEN)) as url:
        with pytest.raises(RemoteRewardError, match=r"refused: status 401 \(unauthorized\): .*there is none"):
            Remote(url).load_weights()
        monkeypatch.setenv("MY_TOKEN", "x" * 16)
        with pytest.raises(RemoteRewardError, match="it is not the server's") as error:
            Remote(url, token_variable="MY_TOKEN").load_weights()
        assert "x" * 16 not in str(error.value)
        monkeypatch.setenv("MY_TOKEN", TOKEN)
        assert Remote(url, token_variable="MY_TOKEN")(some_images(2), ["a", "b"]).shape == (2,)


@pytest.mark.parametrize(
    "token", ["", "short", "with spaces in it, oh", "line\r\nX-Injected: 1234", "hörsehörsehörsehörse"]
)
def test_a_bad_token_is_not_sent_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_RTB_TOKEN", token)
    with pytest.raises(
        ValueError, match=r"The token in DIFFUSION_RTB_TOKEN has .* at least 16, printable ASCII"
    ) as error:
        describe({"component": "remote", "servers": "http://127.0.0.1:1"}, "reward")
    assert not token or token not in str(error.value)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"servers": []}, "servers is empty"),
        ({"servers": "localhost:8817"}, "'localhost:8817' is not an address: write http://HOST:PORT"),
        ({"servers": "ftp://a"}, "is not an address"),
        ({"servers": "http://"}, "is not an address"),
        ({"servers": "http://a b"}, "is not an address"),
        ({"servers": "http://a:port"}, "Port could not be cast"),
        ({"servers": "http://a:99999"}, "Port out of range"),
        ({"servers": "http://me:secret@a"}, "without user name"),
        ({"servers": "http://a/?x=1"}, "without user name, query"),
        ({"servers": ["http://a", "http://a/"]}, "servers names 'http://a' twice"),
        ({"servers": "http://a", "encoding": "pickle"}, "Input should be 'safetensors'"),
        ({"servers": "http://a", "batch": 0}, "batch is 0: at least 1"),
        ({"servers": "http://a", "timeout": 0}, r"timeout is 0\.0: it must be a positive number of seconds"),
        ({"servers": "http://a", "backoff": -1}, "backoff is -1"),
        ({"servers": "http://a", "max_backoff": float("inf")}, "max_backoff is inf"),
        ({"servers": "http://a", "retries": -1}, "retries is -1: it must be 0 or more"),
        ({"server": "http://a"}, "no argument 'server'.*mean 'servers'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], expected: str) -> None:
    for attempt in (describe, build):
        with pytest.raises(ValueError, match=expected):
            attempt({"component": "remote", **arguments}, "reward")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *name],
        check=True,
        capture_output=True,
    )
    with in_thread(app(), ssl_keyfile=str(key), ssl_certfile=str(certificate)) as url:
        with pytest.raises(RemoteRewardError, match=r"is not who it says: .*certificate verify failed"):
            Remote(url).load_weights()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert Remote(url)(some_images(2), ["a", "b"]).shape == (2,)


def run_config(prior: Path, out: Path, reward: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "out": str(out),
            "prior": {"component": "stable_diffusion", "path": str(prior), "steps": 2, "device": "cpu"},
            "reward": reward,
            "beta": 0.5,
            "posterior": {"rank": 1, "alpha": 1.0},
            "prompts": {"list": ["a cat", "a dog"]},
            "train": {
                **{"iterations": 4, "prompts_per_iteration": 2, "group": 2, "micro_batch": 4},
                "grid_every": 0,
            },
        }
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_a_lost_server_stops_the_run_with_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short absence is waited for, a long one stops the run; continued, it has the numbers of an undisturbed local run."""
    monkeypatch.setenv("DIFFUSION_RTB_TOKEN", TOKEN)
    prior = save_tiny(tmp_path / "prior")
    assemble(run_config(prior, tmp_path / "local", {"component": "jpeg"})).fit()

    port, component = free_port(), {"component": "jpeg"}
    served = Served("jpeg", reward_id(component), token=TOKEN)
    jpeg = create_app(torch_score(Jpeg(), "jpeg", "cpu"), served)
    waits = {"retries": 7, "backoff": 0.02, "max_backoff": 0.5}
    config = run_config(
        prior,
        tmp_path / "remote",
        {"component": "remote", "servers": f"http://127.0.0.1:{port}", **waits},
    )
    assert TOKEN not in config_text(config)
    with ExitStack() as server:
        server.enter_context(in_thread(jpeg, port))
        trainer = assemble(config)
        remote, calls = trainer.sampler.reward, 0
        back = threading.Timer(0.3, lambda: server.enter_context(in_thread(jpeg, port)))

        def away_in_the_second_and_lost_in_the_third(images: Tensor, prompts: Sequence[str]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                server.close()
                back.start()
            if calls == 3:
                back.join()
                server.close()
            return remote(images, prompts)

        trainer.sampler.reward = away_in_the_second_and_lost_in_the_third
        with pytest.raises(RewardError, match="RemoteRewardError: No reward server answered in 8 tries"):
            trainer.fit()
    folder = tmp_path / "remote" / "tiny"
    assert [row["iteration"] for row in metrics(folder)] == [0, 1]
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    assert latest.name.endswith("000002")
    with in_thread(jpeg, port):
        assemble(config).fit()
    assert metrics(folder) == metrics(tmp_path / "local" / "tiny")
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
