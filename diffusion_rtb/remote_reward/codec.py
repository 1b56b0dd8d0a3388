"""Images and prompts as the bytes of a request, and back; see `messages` for the format.

What comes in is foreign: sizes are read and compared with the limits before pixels are decoded.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Num, UInt8
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from diffusion_rtb.config.prompt_files import json_object
from diffusion_rtb.config.prompts import HALVES, Metadata
from diffusion_rtb.remote_reward.messages import (
    JSON_TYPE,
    MOST_METADATA,
    SAFETENSORS_TYPE,
    SCHEMA_VERSION,
    Encoding,
    Limits,
    PngRequest,
    PromptsRequest,
    WireError,
    parsed,
)

__all__ = ["Batch", "Post", "as_float", "decode", "decode_prompts", "encode", "encode_prompts", "posts", "quantised"]

Pixels = UInt8[np.ndarray, "batch 3 height width"]
Floats = Float32[np.ndarray, "batch 3 height width"]

PNG_START = b"\x89PNG\r\n\x1a\n"

ALLOWED = {"images": "F32", "request": "U8"}
"""Tensors of a request and their types."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A decoded request."""

    images: Num[np.ndarray, "batch 3 height width"]
    """uint8, or float32 in [0, 1]."""
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] | None = None
    """One per image; None: the request has none."""


def quantised(images: Floats) -> Pixels:
    """round(255·x), half to even: x/255 of the result differs from the images by up to 1/510."""
    return np.rint(images * np.float32(255)).astype(np.uint8)


def as_float(images: Num[np.ndarray, "batch 3 height width"]) -> Floats:
    """float32 in [0, 1]; float images as they are."""
    return images / np.float32(255) if images.dtype == np.uint8 else images


def encode(
    images: Floats, prompts: Sequence[str], encoding: Encoding, metadata: Sequence[Metadata] | None = None
) -> tuple[bytes, str]:
    """The body of a request and its media type.

    Args:
        images: In [0, 1].
        prompts: One per image.
        encoding: "safetensors" is exact, "json_png" rounds to 8 bits.
        metadata: One per image; None: the reward takes none.

    Raises:
        ValueError: images, prompts and metadata do not pair up, images not finite or outside [0, 1], a prompt that is no text.
    """
    _check_floats(images)
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: a request needs one prompt per image.")
    header = _header(prompts, metadata)
    if encoding == "safetensors":
        request = np.frombuffer(_json(header), np.uint8)
        return save({"images": np.ascontiguousarray(images), "request": request}), SAFETENSORS_TYPE
    files = [base64.b64encode(_png(image)).decode() for image in quantised(images)]
    return _json(header | {"images": files}), JSON_TYPE


@dataclass(frozen=True)
class Post:
    """One request."""

    body: bytes
    media_type: str
    images: int
    """How many it holds."""


def posts(
    images: Float32[np.ndarray, "batch 3 height width"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata] | None,
    encoding: Encoding,
    *,
    size: int,
    most_bytes: int,
) -> list[Post]:
    """Requests of at most `size` images and, down to single images, `most_bytes` bytes, in the order of the images.

    Raises:
        ValueError: see `encode`.
    """
    found = []
    for start in range(0, len(images), size):
        cut = slice(start, start + size)
        rows = None if metadata is None else metadata[cut]
        body, media_type = encode(images[cut], prompts[cut], encoding, rows)
        count = len(images[cut])
        if len(body) <= most_bytes or count == 1:
            found.append(Post(body, media_type, count))
        else:  # how well images compress is known only afterwards
            half = (count + 1) // 2
            found += posts(images[cut], prompts[cut], rows, encoding, size=half, most_bytes=most_bytes)
    return found


def encode_prompts(prompts: Sequence[str], metadata: Sequence[Metadata]) -> bytes:
    """The body of a request to check prompts; ValueError as in `encode`."""
    return _json(_header(prompts, metadata))


def decode_prompts(body: bytes) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """The prompts of such a body and their metadata; WireError as in `decode`."""
    request = parsed(PromptsRequest.model_validate_json, body, "The request")
    found = _metadata(request)
    return tuple(request.prompts), found or ({},) * len(request.prompts)


def decode(body: bytes, media_type: str, limits: Limits) -> Batch:
    """Images and prompts of a request's body.

    Raises:
        WireError: the body is damaged (400), not of the format (422), beyond the limits (413) or of another type (415).
    """
    if len(body) > limits.max_body_bytes:
        raise _too_large(f"the body has {len(body)} bytes", "max_body_bytes", limits.max_body_bytes)
    kind = media_type.partition(";")[0].strip().lower()
    if kind == SAFETENSORS_TYPE:
        return _from_safetensors(body, limits)
    if kind == JSON_TYPE:
        return _from_json(body, limits)
    older = " It is that of version 1: the client has an older diffusion-rtb." if kind == "application/x-npz" else ""
    message = f"The media type {media_type!r} is not read here: send {JSON_TYPE} or {SAFETENSORS_TYPE}.{older}"
    raise WireError(message, status=415, code="media_type")


def _too_large(what: str, limit: str, value: int) -> WireError:
    return WireError(f"{what}, above {limit}={value}: send fewer images at once.", status=413, code="too_large")


def _odd(message: str) -> WireError:
    """A request that can be read and is not of the format."""
    return WireError(message, status=422, code="schema")


def _header(prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> dict[str, Any]:
    for prompt in prompts:
        if HALVES.search(prompt):
            raise ValueError(f"The prompt {prompt!r} holds half a surrogate pair and cannot be sent as UTF-8.")
    header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "prompts": list(prompts)}
    if metadata is None:
        return header
    if len(metadata) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(metadata)} rows of metadata: a request needs one per prompt."
        )
    return header | {"metadata": [json.dumps(dict(row), allow_nan=False) for row in metadata]}


def _metadata(request: PromptsRequest) -> Any:
    """Each row is measured before it is parsed."""
    if request.metadata is None:
        return None
    if len(request.metadata) != len(request.prompts):
        raise _odd(f"{len(request.prompts)} prompts and {len(request.metadata)} rows of metadata: one per prompt.")
    largest = max(len(text.encode()) for text in request.metadata)
    if largest > MOST_METADATA:
        message = f"the metadata of a prompt has {largest} bytes, above {MOST_METADATA}"
        raise WireError(f"{message}: leave out what the reward does not need.", status=413, code="too_large")
    try:
        return tuple(json_object(text, f"metadata.{i}") for i, text in enumerate(request.metadata))
    except ValueError as error:
        raise _odd(str(error)) from None


def _check_shape(shape: Sequence[int], prompts: Sequence[str], limits: Limits) -> None:
    if len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
        raise _odd(f"images has shape {tuple(shape)}: it must be (batch, 3, height, width).")
    if shape[0] != len(prompts):
        raise _odd(f"{shape[0]} images and {len(prompts)} prompts: a request needs one prompt per image.")
    if shape[0] > limits.max_batch:
        raise _too_large(f"{shape[0]} images", "max_batch", limits.max_batch)
    pixels = math.prod(shape) // 3
    if pixels > limits.max_pixels:
        raise _too_large(f"{pixels} pixels", "max_pixels", limits.max_pixels)


def _check_floats(images: Floats) -> None:
    if not np.isfinite(images).all():
        raise ValueError("images holds values that are not finite.")
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images has values from {images.min():g} to {images.max():g}: they must lie in [0, 1].")


def _json(data: object) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _from_json(body: bytes, limits: Limits) -> Batch:
    request = parsed(PngRequest.model_validate_json, body, "The request")
    files = [_base64(file) for file in request.images]
    sizes = [_png_size(file) for file in files]
    if len(set(sizes)) > 1:
        raise _odd("The images of one request must be of one size.")
    _check_shape((len(files), 3, *sizes[0]), request.prompts, limits)
    images = np.empty((len(files), 3, *sizes[0]), np.uint8)
    for place, file in zip(images, files, strict=True):  # one after the other: nothing is held twice
        place[:] = _pixels(file)
    return Batch(images, tuple(request.prompts), _metadata(request))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _odd(f"images is not base64: {error}.") from None


def _png(image: UInt8[np.ndarray, "3 height width"]) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, format="PNG", compress_level=1)
        return file.getvalue()


def _png_size(file: bytes) -> tuple[int, int]:
    """Height and width as the head of the file says; other kinds of PNG would be converted silently, so they are refused."""
    if len(file) < 33 or file[:8] != PNG_START or file[12:16] != b"IHDR":
        raise _odd("An image is not a PNG file.")
    width, height, depth, colour = struct.unpack(">IIBB", file[16:26])
    if (depth, colour) != (8, 2):
        raise _odd(f"An image is a PNG of {depth} bits and colour type {colour}: send 8-bit RGB (colour type 2).")
    return height, width


def _pixels(file: bytes) -> UInt8[np.ndarray, "3 height width"]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            image.verify()  # loading alone checks no sums and stops at the last pixel
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # noqa: BLE001 — whatever a parser raises on foreign bytes, they are what is wrong
        raise _odd(f"An image is a damaged PNG file: {error}.") from None


def _from_safetensors(body: bytes, limits: Limits) -> Batch:
    try:
        tensors = dict(deserialize(body))  # refuses a body that is not, to the byte, what its head promises
    except SafetensorError as error:
        raise WireError(f"The body is not a safetensors file: {error}.") from None
    found = {name: tensor["dtype"] for name, tensor in tensors.items()}
    if found != ALLOWED:
        shown = f"{len(found)}: " + ", ".join(f"{name!r} {found[name]}" for name in sorted(found)[:4])
        raise _odd(f"The body must hold the tensors images, F32, and request, U8, and nothing else; it has {shown}.")
    request = parsed(PromptsRequest.model_validate_json, bytes(tensors["request"]["data"]), "request")
    shape = tensors["images"]["shape"]
    _check_shape(shape, request.prompts, limits)
    images = np.frombuffer(tensors["images"]["data"], "<f4").reshape(shape)
    try:
        _check_floats(images)
    except ValueError as error:
        raise _odd(str(error)) from None
    return Batch(images, tuple(request.prompts), _metadata(request))
