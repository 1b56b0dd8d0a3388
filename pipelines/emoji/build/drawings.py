"""Emoji drawings from the npm registry: fetch, rasterise, composite on a background.

`@iconify-json/*` packages hold one `icons.json` per set with the SVG body of every icon under a shared CLDR name. Icons
that all three sets draw are rasterised once into an array and kept in the work folder.
"""

from __future__ import annotations

import io
import json
import logging
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from pipelines.emoji import COLOURS, ICONS, STYLES

log = logging.getLogger(__name__)

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
SIZE = 64
MARGIN = 4  # pixels around every drawing, so that the background is always visible
SKIP_WORDS = ("skin-tone", "keycap", "japanese-", "-button", "arrow", "facing-right", "oclock", "-thirty")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Drawings:
    """All usable drawings.

    names  caption names, those of `ICONS` first
    rgba   (names, styles, 64, 64, 4) uint8, straight alpha
    """

    names: tuple[str, ...]
    rgba: Bytes

    @property
    def known(self) -> npt.NDArray[np.int64]:
        """Where the prior's own names are: at the beginning, see `names`."""
        return np.arange(len(ICONS))


def fetch(cache: Path) -> dict[str, dict[str, Any]]:
    """Download the three packages into `cache` (once) and return style -> parsed `icons.json`."""
    cache.mkdir(parents=True, exist_ok=True)
    sets = {}
    for style, package in PACKAGES.items():
        archive = cache / (package[1:].replace("/", "-").replace("@", "-") + ".tgz")
        if not archive.exists():
            log.info("npm pack %s", package)
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            sets[style] = json.load(member)
    return sets


def caption_names(shared: set[str]) -> dict[str, str]:
    """Caption name -> icon for every usable icon in `shared`, the everyday words of `ICONS` first.

    An icon whose own name means another drawing in a caption ("cat" is the cat's face) is left out.
    """
    chosen = dict(ICONS)
    taken = set(ICONS.values())
    for icon in sorted(shared - taken):
        if not any(word in icon for word in SKIP_WORDS):
            chosen.setdefault(icon.replace("-", " "), icon)
    return chosen


def rasterise(icons: dict[str, Any], name: str) -> Bytes:
    """One icon as (64, 64, 4) uint8 with a transparent margin."""
    icon = icons["icons"][name]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    inner = SIZE - 2 * MARGIN
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner))
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(Image.open(io.BytesIO(png)).convert("RGBA"), (MARGIN, MARGIN))
    return np.asarray(canvas)


def load(work: Path) -> Drawings:
    """Drawings from `work/drawings.npz`, made on the first call (about a minute)."""
    file = work / "drawings.npz"
    if not file.exists():
        sets = fetch(work / "cache")
        shared = set.intersection(
            *({n for n, icon in s["icons"].items() if not icon.get("hidden")} for s in sets.values())
        )
        names = caption_names(shared)
        log.info("rasterising %d icons in %d styles", len(names), len(STYLES))
        rgba = np.stack([[rasterise(sets[style], icon) for style in STYLES] for icon in names.values()])
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, names=np.array(list(names)), rgba=rgba)
        partial.rename(file)
    with np.load(file) as data:
        return Drawings(tuple(str(n) for n in data["names"]), data["rgba"])


def composite(rgba: npt.NDArray[Any], colours: Sequence[str], rng: np.random.Generator, *, jitter: int = 8) -> Bytes:
    """Drawings (batch, 64, 64, 4) on named backgrounds -> (batch, 64, 64, 3) uint8.

    Each background channel is moved by up to `jitter` grey levels, so that a colour word names a small region.
    """
    back = np.array([COLOURS[c] for c in colours], dtype=np.float32)
    back = np.clip(back + rng.uniform(-jitter, jitter, back.shape), 0, 255).astype(np.float32)[:, None, None]
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + back * (1 - alpha)).astype(np.uint8)


def shift(rgba: Bytes, rng: np.random.Generator, *, reach: int) -> Bytes:
    """Move each drawing (batch, 64, 64, 4) by up to `reach` pixels; the margin keeps shifts <= 4 lossless."""
    moves = rng.integers(-reach, reach + 1, (len(rgba), 2))
    return np.stack([np.roll(image, tuple(move), axis=(0, 1)) for image, move in zip(rgba, moves, strict=True)])
