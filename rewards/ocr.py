"""Does the image say what its prompt quotes? Judged by optical character recognition."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.prompts import Metadata
from rewards._levels import broken_is_nan, levels

__all__ = ["Ocr", "edit_distance", "quoted"]

QUOTES = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')


class Ocr:
    r"""r(x) = 1 − min(D, n) / n in [0, 1], with D the edit distance between the recognised and the wanted text of n characters.

    The wanted text is what the prompt has in double quotes ("…", “…”, «…»), several quotations in their order. Compared are
    letters in lower case without white space, compatible forms made equal (NFKC). With `extra="ignored"` D is 0 as soon as the
    wanted text is part of the recognised one: then this is the reward of Liu et al., "Flow-GRPO", 2025,
    https://arxiv.org/abs/2505.05470. With "counted" every surplus character costs 1/n as well.

    Recognition is PP-OCRv4 by `rapidocr-onnxruntime`, on the CPU, image by image, from top to bottom, not differentiable. A square
    image of up to 256 pixels takes 0.06 s at the default `side` and 0.2 s at 736, RapidOCR's own (one core of an AMD EPYC).

    Args:
        text: Wanted in every image, instead of what prompts quote.
        extra: What recognised text beside the wanted one counts: "ignored" or "counted".
        side: Pixels to which the shorter side of an image is enlarged to find text; smaller is faster and misses small text.
        confidence: Lines recognised with less are left out, in [0, 1).
    """

    def __init__(
        self, text: str | None = None, *, extra: str = "ignored", side: int = 384, confidence: float = 0.5
    ) -> None:
        self.check(text, extra=extra, side=side, confidence=confidence)
        from rapidocr_onnxruntime import RapidOCR

        self.text = None if text is None else plain(text)
        self.ignored = extra == "ignored"
        threads = torch.get_num_threads()  # by default each of its three networks would take every core
        self._reader: Any = RapidOCR(
            intra_op_num_threads=threads,
            inter_op_num_threads=1,
            det_limit_side_len=side,
            text_score=confidence,
            use_cls=False,  # it turns what is upside down
        )

    @staticmethod
    def check(text: str | None = None, *, extra: str = "ignored", side: int = 384, confidence: float = 0.5) -> None:
        """Refuse bad arguments, and a missing package, before anything is loaded; ValueError."""
        import importlib.util

        if text is not None and not plain(text):
            raise ValueError(f"text is {text!r}: it has no letters; leave it out to take what the prompts quote.")
        if extra not in ("ignored", "counted"):
            raise ValueError(f"extra is {extra!r}: use 'ignored' or 'counted'.")
        if not 32 <= side <= 4096:
            raise ValueError(f"side is {side}: use 32 to 4096 pixels.")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence is {confidence}: it must be in [0, 1).")
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise ValueError(
                "The reward 'ocr' needs rapidocr-onnxruntime, which is not installed: pip install 'diffusion-rtb[ocr]' "
                "(Python below 3.13; elsewhere serve it from another environment with `diffusion-rtb serve-reward`)."
            )

    @staticmethod
    def check_prompts(prompts: Sequence[str], metadata: Sequence[Metadata], *, text: str | None = None) -> None:
        """Refuse prompts that quote nothing, where no `text` is given; ValueError."""
        without = [] if text is not None else [prompt for prompt in prompts if not _wanted(prompt)]
        if without:
            raise ValueError(
                f"{len(without)} quote no text, the first is {without[0]!r}: write them like 'a sign that says \"open\"', take "
                "them out, or give the reward `text: open`."
            )

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        wanted = [self.text or quoted(prompt) for prompt in prompts]  # before the slow part
        values = [self._score(found, text) for found, text in zip(self.read(images), wanted, strict=True)]
        return broken_is_nan(torch.tensor(values, dtype=torch.float32), images)

    def read(self, images: Float[Tensor, "batch 3 height width"]) -> list[str]:
        """The recognised text of each image, line by line, as compared."""
        found = []
        for image in levels(images).flip(3):  # blue, green, red
            lines, _ = self._reader(image.contiguous().numpy())
            found.append(plain("".join(line[1] for line in lines or [])))
        return found

    def _score(self, found: str, wanted: str) -> float:
        if self.ignored and wanted in found:
            return 1.0
        return 1 - min(edit_distance(found, wanted), len(wanted)) / len(wanted)


def quoted(prompt: str) -> str:
    """What a prompt has in double quotes, as compared.

    Raises:
        ValueError: it quotes nothing.
    """
    text = _wanted(prompt)
    if not text:
        raise ValueError(
            f"Prompt {prompt!r} quotes no text: write it like 'a sign that says \"open\"', or give the reward `text: open`."
        )
    return text


def _wanted(prompt: str) -> str:
    return plain("".join("".join(found) for found in QUOTES.findall(prompt)))


def plain(text: str) -> str:
    """Lower case, NFKC, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(one: str, other: str) -> int:
    """The least number of insertions, deletions and substitutions of a character that make `one` `other`.

    Levenshtein 1966; row by row as in Wagner and Fischer 1974, https://doi.org/10.1145/321796.321811.
    """
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]
