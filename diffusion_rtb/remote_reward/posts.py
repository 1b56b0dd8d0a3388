"""A batch of images as the requests that it takes, none of them beyond a server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.remote_reward.codec import encode
from diffusion_rtb.remote_reward.messages import Encoding

__all__ = ["Post", "posts"]


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
