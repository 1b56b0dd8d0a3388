"""The reward server: what it is sent is read exactly or refused with the reason, and nothing but finite rewards leaves it."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.numpy import save

from diffusion_rtb.remote_reward.app import Served, create_app
from diffusion_rtb.remote_reward.codec import Batch, as_float, decode, encode, quantised
from diffusion_rtb.remote_reward.messages import ENCODINGS, JSON_TYPE, SAFETENSORS_TYPE, Encoding, Limits, WireError
from diffusion_rtb.remote_reward.serve import Address, Work, component_of, numpy_score, reward_id, serve, torch_score
from tests.oracles.serving import ROOT, ask, in_thread

LIMITS = Limits(max_batch=8, max_body_bytes=200_000, max_pixels=20_000)
TOKEN = "correct-horse-battery"

UNIT = st.floats(0, 1, width=32)
IMAGES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(3), st.integers(1, 9), st.integers(1, 9)), elements=UNIT
)


def some_images(count: int = 2, height: int = 4, width: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((count, 3, height, width), dtype=np.float32)


def header(prompts: Sequence[Any] = ("a", "b"), version: Any = 2, **more: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(json.dumps({"schema_version": version, "prompts": list(prompts), **more}).encode(), np.uint8)


def packed(images: np.ndarray[Any, Any], request: np.ndarray[Any, Any] | None = None, **more: Any) -> bytes:
    return save({"images": images, "request": header() if request is None else request, **more})


def png(image: np.ndarray[Any, Any], mode: str | None = None, **options: Any) -> str:
    with io.BytesIO() as file:
        picture = Image.fromarray(image)
        (picture.convert(mode) if mode else picture).save(file, format="PNG", **options)
        return base64.b64encode(file.getvalue()).decode()


def message(**parts: Any) -> bytes:
    return json.dumps({"schema_version": 2, "prompts": ["a", "b"], **parts}).encode()


SQUARE = np.zeros((4, 4, 3), np.uint8)
PNGS = [png(SQUARE), png(SQUARE)]


@settings(max_examples=60, deadline=None)
@given(images=IMAGES, data=st.data())
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_encoded_is_decoded(encoding: Encoding, images: np.ndarray[Any, Any], data: st.DataObject) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    prompts = data.draw(st.lists(text, min_size=len(images), max_size=len(images)))
    body, media_type = encode(images, prompts, encoding)
    batch = decode(body, media_type, LIMITS)
    assert batch.prompts == tuple(prompts)
    if encoding == "safetensors":
        assert batch.images.tobytes() == images.tobytes()
        return
    # A product in float32 may fall on the other side of a half; then it is half a step off all the same.
    assert np.abs(batch.images - images.astype(np.float64) * 255).max() <= 0.5 + 1e-5
    assert np.abs(as_float(batch.images).astype(np.float64) - images).max() <= 1 / 510 + 1e-7


def test_eight_bit_values_survive_every_encoding() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 3, 16, 16)
    for encoding in ENCODINGS:
        batch = decode(*encode(as_float(values), ["all"], encoding), LIMITS)
        assert (
            quantised(batch.images) if batch.images.dtype == np.float32 else batch.images
        ).tobytes() == values.tobytes()


def test_a_png_that_pillow_wrote_is_read_as_pillow_reads_it() -> None:
    picture = (np.random.default_rng(1).random((6, 7, 3)) * 255).astype(np.uint8)
    body = message(prompts=["a"], images=[png(picture, optimize=True)])
    assert (decode(body, JSON_TYPE, LIMITS).images[0].transpose(1, 2, 0) == picture).all()


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: (x * 2, ["a", "b"]), r"values from .* to 1\.\d+: they must lie in \[0, 1\]"),
        (lambda x: (x - 1, ["a", "b"]), r"must lie in \[0, 1\]"),
        (lambda x: (x * np.float32("nan"), ["a", "b"]), "not finite"),
        (lambda x: (x, ["a"]), "2 images and 1 prompts"),
        (lambda x: (x, ["a", "\ud800"]), "half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_cannot_be_sent_is_refused_before_sending(encoding: Encoding, change: Any, expected: str) -> None:
    images, prompts = change(some_images())
    with pytest.raises(ValueError, match=expected):
        encode(images, prompts, encoding)


def promising(
    images: str, request: str = '"dtype":"U8","shape":[2],"data_offsets":[0,2]', held: bytes = b"{}"
) -> bytes:
    """A body whose head promises something of its tensors and which holds something else."""
    head = f'{{"images":{{{images}}},"request":{{{request}}}}}'.encode()
    return struct.pack("<Q", len(head)) + head + held


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_head(width: int, height: int, depth: int = 8, colour: int = 2) -> str:
    """A valid PNG of that size, as small as it gets: its pixels are missing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


class Harmful:
    """What an attacker puts into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


BAD: list[tuple[bytes, str, int, str]] = [
    (b"", JSON_TYPE, 400, "EOF while parsing"),
    (b"{", JSON_TYPE, 400, "EOF while parsing"),
    (b"\xff\xfe", JSON_TYPE, 400, "The request"),
    (b"[" * 100_000, JSON_TYPE, 400, "recursion limit"),
    (b"[]", JSON_TYPE, 422, "The request"),
    (b"NaN", JSON_TYPE, 422, "The request"),
    (message(), JSON_TYPE, 422, "images: Field required"),
    (message(images=[]), JSON_TYPE, 422, "images: .*at least 1 item"),
    (
        message(images=PNGS, schema_version=1),
        JSON_TYPE,
        422,
        "speaks schema version 2, the other 1; use matching versions",
    ),
    (message(images=PNGS, schema_version=1, encoding="png"), JSON_TYPE, 422, "speaks schema version 2, the other 1"),
    (message(images=PNGS, schema_version=True), JSON_TYPE, 422, "schema_version"),
    (message(images=PNGS, quality=1), JSON_TYPE, 422, "quality: Extra inputs are not permitted"),
    (message(images=PNGS, prompts=["a", 1]), JSON_TYPE, 422, r"prompts\.1: .*valid string, got 1"),
    (message(images=PNGS, prompts=["a"]), JSON_TYPE, 422, "2 images and 1 prompts"),
    (message(images=PNGS, prompts=[]), JSON_TYPE, 422, "prompts: .*at least 1 item"),
    (message(images=[PNGS[0], "%%%"]), JSON_TYPE, 422, "images is not base64"),
    (message(images=[PNGS[0], ""]), JSON_TYPE, 422, "not a PNG file"),
    (message(images=[PNGS[0], PNGS[1][:80]]), JSON_TYPE, 422, "damaged PNG"),
    (message(images=[PNGS[0], png(SQUARE[:2])]), JSON_TYPE, 422, "must be of one size"),
    (
        message(images=[png(SQUARE, "L")] * 2),
        JSON_TYPE,
        422,
        "8 bits and colour type 0: send 8-bit RGB",
    ),
    (message(images=[png(SQUARE, "RGBA")] * 2), JSON_TYPE, 422, "colour type 6"),
    (message(images=[png(SQUARE, "P")] * 2), JSON_TYPE, 422, "colour type 3"),
    (message(images=[png_head(4, 4, depth=16)] * 2), JSON_TYPE, 422, "16 bits"),
    (message(images=[png_head(4, 4)] * 2), JSON_TYPE, 422, "damaged PNG"),
    (message(images=[png_head(0, 4)] * 2), JSON_TYPE, 422, r"shape \(2, 3, 4, 0\)"),
    (message(images=[png_head(100_000, 100_000)] * 2), JSON_TYPE, 413, "above max_pixels=20000"),
    (message(images=PNGS * 5, prompts=["a"] * 10), JSON_TYPE, 413, "10 images, above max_batch=8"),
    (b" " * 200_001, JSON_TYPE, 413, "200001 bytes, above max_body_bytes=200000"),
    (pickle.dumps([1, 2]), "application/octet-stream", 415, "send application/json or application/x-safetensors"),
    (b"PK", "application/x-npz", 415, "It is that of version 1: the client has an older diffusion-rtb"),
    (b"{}", "", 415, "media type ''"),
    (b"", SAFETENSORS_TYPE, 400, "not a safetensors file"),
    (pickle.dumps(Harmful()), SAFETENSORS_TYPE, 400, "not a safetensors file"),
    (packed(some_images())[:-40], SAFETENSORS_TYPE, 400, "not a safetensors file"),
    (packed(some_images()) + b"x", SAFETENSORS_TYPE, 400, "not a safetensors file"),
    (b"\xff" * 40, SAFETENSORS_TYPE, 400, "not a safetensors file"),
    (save({"images": some_images()}), SAFETENSORS_TYPE, 422, "nothing else; it has 1: 'images' F32"),
    (packed(some_images(), more=some_images()), SAFETENSORS_TYPE, 422, "nothing else; it has 3"),
    (packed(some_images().astype(np.float64)), SAFETENSORS_TYPE, 422, "'images' F64, 'request' U8"),
    (packed(some_images().astype(np.uint8)), SAFETENSORS_TYPE, 422, "'images' U8"),
    (packed(some_images() * 2), SAFETENSORS_TYPE, 422, r"must lie in \[0, 1\]"),
    (packed(some_images() * np.float32("inf")), SAFETENSORS_TYPE, 422, "not finite"),
    (packed(some_images()[0]), SAFETENSORS_TYPE, 422, r"shape \(3, 4, 5\): it must be \(batch, 3"),
    (packed(some_images()[:, :1].copy()), SAFETENSORS_TYPE, 422, r"shape \(2, 1, 4, 5\)"),
    (packed(some_images()[:0]), SAFETENSORS_TYPE, 422, r"shape \(0, 3, 4, 5\)"),
    (packed(some_images(), header("abc")), SAFETENSORS_TYPE, 422, "2 images and 3 prompts"),
    (packed(some_images(), header(version=1)), SAFETENSORS_TYPE, 422, "speaks schema version 2, the other 1"),
    (packed(some_images(), header(images=[])), SAFETENSORS_TYPE, 422, "request: images: Extra inputs"),
    (packed(some_images(), header()[:-1]), SAFETENSORS_TYPE, 400, "request: .*EOF"),
    (packed(some_images(9, 1, 1), header("a" * 9)), SAFETENSORS_TYPE, 413, "9 images, above max_batch=8"),
    (promising('"dtype":"F32","shape":[2,3,100000,100000],"data_offsets":[2,2]'), SAFETENSORS_TYPE, 400, "not a safe"),
    (promising('"dtype":"F32","shape":[2,3,-4,-4],"data_offsets":[2,386]'), SAFETENSORS_TYPE, 400, "not a safetensors"),
    (
        promising('"dtype":"F32","shape":[4294967296,4294967296,4294967296,3],"data_offsets":[2,2]'),
        *(SAFETENSORS_TYPE, 400, "not a safetensors"),
    ),
    (
        promising('"dtype":"F32","shape":[2,3,4,4],"data_offsets":[0,384]', held=bytes(384)),
        SAFETENSORS_TYPE,
        400,
        "not a",
    ),
    (struct.pack("<Q", 60_000) + b"[" * 60_000, SAFETENSORS_TYPE, 400, "not a safetensors file"),
]


@pytest.mark.parametrize("body, media_type, status, expected", BAD, ids=range(len(BAD)))
def test_what_is_not_a_request_is_refused(
    body: bytes, media_type: str, status: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WireError, match=expected) as error:
        decode(body, media_type, LIMITS)
    assert error.value.status == status
    assert not list(tmp_path.iterdir()), "something was executed"


def test_the_pixels_of_both_encodings_are_counted() -> None:
    for encoding in ENCODINGS:
        with pytest.raises(WireError, match="40 pixels, above max_pixels=39: send fewer images"):
            decode(*encode(some_images(), ["a", "b"], encoding), Limits(max_pixels=39))


def test_the_size_of_a_png_is_checked_before_its_pixels_exist() -> None:
    pixels = zlib.compress(bytes(3 * 4000 * 4001), 9)  # 48 MB in 47 kB
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4000, 4000, 8, 2, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    body = message(prompts=["a"], images=[base64.b64encode(file).decode()])
    assert len(body) < LIMITS.max_body_bytes
    start = time.perf_counter()
    with pytest.raises(WireError, match="16000000 pixels, above max_pixels"):
        decode(body, JSON_TYPE, LIMITS)
    assert time.perf_counter() - start < 0.05


GOOD = {encoding: encode(some_images(), ["a cat", "ein Hund"], encoding) for encoding in ENCODINGS}


def refused_or_valid(body: bytes, media_type: str) -> None:
    """The invariant of `decode`: a batch within the limits, or a refusal with a status of the client's fault."""
    refusal = None
    try:
        batch = decode(body, media_type, LIMITS)
    except WireError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status in (400, 413, 415, 422)
        assert str(refusal)
        return
    assert isinstance(batch, Batch)
    count, channels, height, width = batch.images.shape
    assert channels == 3
    assert 1 <= count == len(batch.prompts) <= LIMITS.max_batch
    assert 1 <= count * height * width <= LIMITS.max_pixels
    values = as_float(batch.images)
    assert values.dtype == np.float32
    assert 0 <= values.min() <= values.max() <= 1


@settings(max_examples=250, deadline=None)
@given(data=st.data(), encoding=st.sampled_from(ENCODINGS))
def test_damaged_requests_are_refused_or_still_valid(data: st.DataObject, encoding: Encoding) -> None:
    body, media_type = GOOD[encoding]
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip" if damaged:
                damaged[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del damaged[at:]
            case "insert":
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "drop":
                del damaged[at : at + data.draw(st.integers(1, 16))]
    refused_or_valid(bytes(damaged), media_type)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "schema_version": st.just(2) | JSON_VALUES,
            "prompts": st.just(["a", "b"]) | st.lists(st.text(max_size=4), max_size=3) | JSON_VALUES,
            "images": st.just(PNGS) | JSON_VALUES,
        },
    )
)
def test_json_of_any_kind_is_refused_or_valid(fields: dict[str, Any]) -> None:
    refused_or_valid(json.dumps(fields).encode(), JSON_TYPE)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["F32", "F32", "U8", "I4", "x"]),
    shape=st.just([2, 3, 1, 1]) | st.lists(st.integers(-1, 2**70), max_size=5),
    offsets=st.just([0, 24]) | st.lists(st.integers(-1, 2**70), min_size=2, max_size=2),
    request=st.just(header().tobytes()) | st.binary(max_size=40),
)
def test_safetensors_of_any_head_are_refused_or_valid(
    dtype: str, shape: list[int], offsets: list[int], request: bytes
) -> None:
    images = json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})[1:-1]
    told = json.dumps({"dtype": "U8", "shape": [len(request)], "data_offsets": [24, 24 + len(request)]})[1:-1]
    refused_or_valid(promising(images, told, bytes(24) + request), SAFETENSORS_TYPE)


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


def app(score: Any = None, **settings: Any) -> Any:
    served = Served("brightness", "brightness-0", settings.pop("limits", LIMITS), **settings)
    return create_app(score or torch_score(brightness, "brightness", "cpu"), served)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_thread(app(token=TOKEN)) as address:
        yield address


def post(
    url: str, body: Any, media_type: str = SAFETENSORS_TYPE, token: str | None = TOKEN
) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": media_type} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    return ask("POST", url, "/score", body, headers)[:2]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rewards_are_those_of_the_reward(url: str, encoding: Encoding) -> None:
    images = some_images(5)
    status, answer = post(url, *encode(images, list("abcde"), encoding))
    assert status == 200
    sent = images if encoding == "safetensors" else quantised(images) / np.float32(255)
    expected = brightness(torch.from_numpy(sent), [])
    assert answer == {"schema_version": 2, "reward_id": "brightness-0", "rewards": expected.tolist()}


def test_health_needs_no_token_and_info_tells_the_limits(url: str) -> None:
    assert ask("GET", url, "/health")[:2] == (200, {"schema_version": 2, "status": "ok"})
    status, info, _ = ask("GET", url, "/info", headers={"Authorization": f"Bearer {TOKEN}"})
    assert status == 200
    assert info["reward_id"] == "brightness-0"
    assert {name: info[name] for name in ("max_batch", "max_body_bytes", "max_pixels")} == vars(LIMITS)
    assert info["encodings"] == list(ENCODINGS)


@pytest.mark.parametrize("path, method", [("/info", "GET"), ("/score", "POST")])
@pytest.mark.parametrize(
    "given, reason",
    [
        (None, "there is none"),
        ("Bearer", "there is none"),
        (f"Basic {TOKEN}", "there is none"),
        ("Bearer wrong-wrong-wrong", "not the server's"),
        (f"Bearer {TOKEN}x", "not the server's"),
        (f"Bearer {TOKEN[:-1]}", "not the server's"),
        (f"Bearer {TOKEN.upper()}", "not the server's"),
        ("Bearer h\xf6rse", "not the server's"),
    ],
)
def test_nobody_gets_in_without_the_token(url: str, path: str, method: str, given: str | None, reason: str) -> None:
    body = GOOD["safetensors"][0] if method == "POST" else None
    headers = {} if given is None else {"Authorization": given}
    status, failure, said = ask(method, url, path, body, headers | {"Content-Type": SAFETENSORS_TYPE})
    assert (status, failure["code"], said["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
    assert reason in failure["message"]
    assert TOKEN not in failure["message"]


@pytest.mark.parametrize("body, media_type, status, expected", BAD[::4], ids=range(0, len(BAD), 4))
def test_refusals_arrive(url: str, body: bytes, media_type: str, status: int, expected: str) -> None:
    found, failure = post(url, body, media_type)
    assert found == status
    assert failure["schema_version"] == 2
    assert isinstance(failure["message"], str)


def test_a_body_is_too_large_however_it_arrives(url: str) -> None:
    status, failure = post(url, bytes(LIMITS.max_body_bytes + 1))
    assert (status, failure["code"]) == (413, "too_large")

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(10_000)

    # In chunks, without a declared length: the server has to count.
    status, failure = post(url, pieces())
    assert (status, failure["code"]) == (413, "too_large")
    assert post(url, *GOOD["safetensors"])[0] == 200


def test_a_body_without_an_end_is_refused_while_it_arrives(url: str) -> None:
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as peer:
        peer.sendall(head.encode() + (b"2710\r\n" + bytes(10_000) + b"\r\n") * 21)
        assert b" 413 " in peer.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "method, path, status", [("GET", "/none", 404), ("GET", "/score", 405), ("POST", "/info", 405)]
)
def test_other_routes_answer_in_the_same_form(url: str, method: str, path: str, status: int) -> None:
    found, failure, _ = ask(method, url, path)
    assert (found, failure["code"]) == (status, f"http_{status}")


def raising(images: Any, prompts: Any) -> Any:
    raise ValueError("no such word")


@pytest.mark.parametrize(
    "score, expected",
    [
        (torch_score(raising, "mine", "cpu"), "raised ValueError: no such word"),
        (torch_score(lambda x, p: x.flatten(1).mean(1) / 0, "mine", "cpu"), "is inf for image 0, prompt 'a cat'"),
        (torch_score(lambda x, p: x.flatten(1), "mine", "cpu"), r"returned shape \(2, 60\)"),
        (torch_score(lambda x, p: x.mul_(0).flatten(1).mean(1), "mine", "cpu"), "changed its input in place"),
        (numpy_score(lambda x, p: np.array([1.0, np.nan])), "is nan for image 1, prompt 'ein Hund'"),
        (numpy_score(lambda x, p: [1.0]), r"returned shape \(1,\).*return one float per image, shape \(2,\)"),
        (numpy_score(lambda x, p: [1, 2]), "of int64"),
        (numpy_score(lambda x, p: None), r"shape \(\) of object"),
        (numpy_score(lambda x, p: x.fill(0)), "read-only"),
        (lambda x, p: np.zeros(3), r"returned shape \(3,\) of float64; return one float per image, shape \(2,\)"),
        (lambda x, p: "none", r"returned shape \(\) of <U4"),
    ],
)
def test_a_reward_that_fails_is_an_error_and_not_a_number(score: Any, expected: str) -> None:
    with in_thread(app(score)) as url:
        status, failure = post(url, *GOOD["safetensors"], token=None)
        assert (status, failure["code"]) == (500, "reward_failed")
        assert "rewards" not in failure
        with pytest.raises(RuntimeError, match=expected):
            raise RuntimeError(failure["message"])
        assert ask("GET", url, "/health")[0] == 200


def test_one_call_at_a_time_and_every_answer_is_ones_own() -> None:
    inside = threading.Lock()

    def alone(images: Any, prompts: Sequence[str]) -> Any:
        assert inside.acquire(blocking=False), "two calls at once"
        time.sleep(0.002)
        inside.release()
        return np.array([float(prompt) for prompt in prompts])

    with in_thread(app(numpy_score(alone))) as url, ThreadPoolExecutor(8) as pool:

        def client(i: int) -> tuple[int, dict[str, Any]]:
            return post(url, *encode(some_images(), [str(i), str(-i)], "safetensors"), token=None)

        for i, (status, answer) in enumerate(pool.map(client, range(40))):
            assert status == 200
            assert answer["rewards"] == [i, -i]


def test_who_does_not_fit_in_the_queue_is_told_to_come_back() -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(images: Any, prompts: Any) -> Any:
        entered.set()
        release.wait(10)
        return np.zeros(len(images))

    request = ("POST", "/score", GOOD["safetensors"][0], {"Content-Type": SAFETENSORS_TYPE})
    with in_thread(app(slow, max_waiting=1)) as url, ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, url, *GOOD["safetensors"], token=None)
        assert entered.wait(10)
        status, failure, headers = ask(request[0], url, *request[1:])
        assert (status, failure["code"], headers["Retry-After"]) == (503, "busy", "1")
        assert ask("GET", url, "/health")[0] == 200
        release.set()
        assert held.result()[0] == 200
        assert ask(request[0], url, *request[1:])[0] == 200


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with in_thread(app(read_timeout=0.2)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as peer:
            peer.sendall(
                f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {SAFETENSORS_TYPE}\r\nContent-Length: 99\r\n\r\nPK".encode()
            )
            said = b""
            while part := peer.recv(4096):
                said += part
        assert b"408" in said.split(b"\r\n")[0]
        assert b"did not arrive within 0.2 s" in said


def test_who_has_gone_is_not_computed() -> None:
    seen: list[str] = []
    release = threading.Event()

    def slow(images: Any, prompts: Sequence[str]) -> Any:
        seen.append(prompts[0])
        release.wait(10)
        return np.zeros(len(images))

    with in_thread(app(slow)) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, *encode(some_images(1), ["first"], "safetensors"), token=None)
        while not seen:
            time.sleep(0.005)
        body = encode(some_images(1), ["gone"], "safetensors")[0]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as peer:
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {SAFETENSORS_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
            peer.sendall(head.encode() + body)
            time.sleep(0.1)
        time.sleep(0.1)
        release.set()
        assert first.result()[0] == 200
        assert post(url, *encode(some_images(1), ["last"], "safetensors"), token=None)[0] == 200
    assert seen == ["first", "last"]


def test_a_network_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match=f"Listening on '{host}' without a token"):
            Address(host)
        assert Address(host, token=TOKEN).host == host
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert Address(host).token is None
    assert TOKEN not in repr(Address(token=TOKEN))
    assert TOKEN not in repr(Served("a", "b", token=TOKEN))


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: Address(port=0), "port is 0: use 1 to 65535"),
        (lambda: Address(token="secret"), "The server's token has 6 characters: it needs at least 16"),
        (lambda: Address("0.0.0.0", token=""), "The server's token has 0 characters"),
        (lambda: Limits(max_batch=0), "max_batch is 0: it must be a whole number, at least 1"),
        (lambda: Work(arrays="numpy", device="cuda"), "device is 'cuda': it is for torch rewards"),
        (lambda: Work(max_waiting=0), "max_waiting is 0"),
        (lambda: serve({"component": "jpeg", "quality": 200}, Address()), "quality is 200"),
        (lambda: serve({"component": "jpgg"}, Address()), "no reward named 'jpgg'.*mean 'jpeg'"),
        (lambda: component_of("jpeg", ["quality"]), "'quality' is not of the form key=value"),
        (lambda: component_of("jpeg", ["a=1", "a=2"]), "each key once"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


def test_a_reward_has_a_fingerprint() -> None:
    a = component_of("jpeg", ["quality=80", "sign=incompress"])
    assert a == {"component": "jpeg", "quality": 80, "sign": "incompress"}
    assert reward_id(a) == reward_id(component_of("jpeg", ["sign=incompress", "quality=80"]))
    assert len({reward_id(a), reward_id({"component": "jpeg"}), reward_id({**a, "quality": 81})}) == 3


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_rtb.remote_reward.serve.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs starlette, which is not installed: pip install 'diffusion-rtb\[server\]'"
    ):
        serve({"component": "jpeg"}, Address())


def test_neither_side_needs_torch_or_the_pipelines() -> None:
    modules = ", ".join(f"diffusion_rtb.remote_reward.{name}" for name in ("serve", "app", "client"))
    code = f"import sys, {modules}\nsys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "accelerate", "torchvision"} & set(done.stdout.split())
