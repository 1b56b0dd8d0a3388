"""Does the image say what its prompt quotes? Judged by optical character recognition."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.config.prompts import Metadata
from rewards._levels import broken_is_nan, levels

__all__ = ["Ocr", "edit_distance", "plain", "quoted", "score"]

Quotations = Literal["first", "all"]
Letters = Literal["lower", "folded"]

STRAIGHT = re.compile(r'"([^"]+)"')
QUOTES = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')


class Ocr(TwoPhase):
    r"""r(x) = 1 − min(D, n) / n in [0, 1], with D the edit distance between the recognised and the wanted text of n characters.

    By default the formula of Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, with a recogniser of our own: the
    wanted text is what the prompt has in its first double quotes, compared are letters in lower case without spaces, D is 0 as
    soon as the wanted text is part of the recognised one, and every line counts that was recognised with any confidence. It
    reads prompts that the published code does not: typographic quotes (“…”, „…“, «…»), where there are no straight ones. A
    recogniser that fails is an error here, not a reward of 0.

    Recognition is PP-OCRv4 by `rapidocr-onnxruntime`, on the CPU, image by image, from top to bottom, not differentiable. A square
    image of up to 256 pixels takes 0.06 s at the default `side` and 0.2 s at 736, RapidOCR's own (one core of an AMD EPYC).

    Args:
        text: Wanted in every image, instead of what prompts quote.
        quotations: Of a prompt with several: the "first", or "all" of them, joined in their order.
        letters: Compared as "lower" makes them, lower case without spaces, or "folded": every white space left out, case folded
            (ß is ss) and compatible forms made equal (NFKC: ﬁ is fi).
        extra: What recognised text beside the wanted one counts: "ignored", or "counted", every surplus character 1/n.
        side: Pixels to which the shorter side of an image is enlarged to find text; smaller is faster and misses small text.
        confidence: Lines recognised with no more than that are left out, in [0, 1).
    """

    no_gradient = "what it recognises in an image is a text"

    def __init__(
        self,
        text: str | None = None,
        *,
        quotations: Quotations = "first",
        letters: Letters = "lower",
        extra: Literal["ignored", "counted"] = "ignored",
        side: int = 384,
        confidence: float = 0.0,
    ) -> None:
        options = (("quotations", quotations, ("first", "all")), ("letters", letters, ("lower", "folded")))
        for name, value, allowed in (*options, ("extra", extra, ("ignored", "counted"))):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}: use {allowed[0]!r} or {allowed[1]!r}.")
        if text is not None and not plain(text, letters).strip():
            raise ValueError(f"text is {text!r}: it has no letters; leave it out to take what the prompts quote.")
        if not 32 <= side <= 4096:
            raise ValueError(f"side is {side}: use 32 to 4096 pixels.")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence is {confidence}: it must be in [0, 1).")
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise ValueError(
                "The reward 'ocr' needs rapidocr-onnxruntime, which is not installed: pip install 'diffusion-rtb[ocr]' "
                "(Python below 3.13; elsewhere serve it from another environment with `diffusion-rtb serve-reward`)."
            )
        self.text = None if text is None else plain(text, letters)
        self.quotations, self.letters, self.confidence = quotations, letters, confidence
        self.ignored = extra == "ignored"
        self.side = side

    def load_weights(self) -> None:
        _ = self._reader

    @cached_property
    def _reader(self) -> Any:
        from rapidocr_onnxruntime import RapidOCR

        threads = torch.get_num_threads()  # by default each of its three networks would take every core
        return RapidOCR(
            intra_op_num_threads=threads,
            inter_op_num_threads=1,
            det_limit_side_len=self.side,
            text_score=0.0,  # `read` leaves out lines itself
            use_cls=False,  # it turns what is upside down
        )

    @staticmethod
    def check_prompts(
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        text: str | None = None,
        quotations: Quotations = "first",
        letters: Letters = "lower",
    ) -> None:
        """Refuse prompts that quote nothing, where no `text` is given; ValueError."""
        without = [] if text is not None else [prompt for prompt in prompts if not _wanted(prompt, quotations, letters)]
        if without:
            raise ValueError(
                f"{len(without)} quote no text, the first is {without[0]!r}: write them like 'a sign that says \"open\"', take "
                "them out, or give the reward `text: open`."
            )

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        wanted = [
            self.text or quoted(prompt, self.quotations, self.letters) for prompt in prompts
        ]  # before the slow part
        pairs = zip(self.read(images), wanted, strict=True)
        values = [score(found, text, ignored=self.ignored) for found, text in pairs]
        return broken_is_nan(torch.tensor(values, dtype=torch.float32), images)

    def read(self, images: Float[Tensor, "batch 3 height width"]) -> list[str]:
        """The recognised text of each image, line by line, as compared."""
        found = []
        for image in levels(images).flip(3):  # blue, green, red
            lines, _ = self._reader(image.contiguous().numpy())
            taken = [text for _, text, confidence in lines or [] if float(confidence) > self.confidence]
            found.append(plain("".join(taken), self.letters))
        return found


def score(found: str, wanted: str, *, ignored: bool = True) -> float:
    """The reward of a recognised text, both as compared; `ignored`: whether more than the wanted text costs nothing."""
    if ignored and wanted in found:
        return 1.0
    return 1 - min(edit_distance(found, wanted), len(wanted)) / len(wanted)


def quoted(prompt: str, quotations: Quotations = "first", letters: Letters = "lower") -> str:
    """What a prompt has in double quotes, as compared.

    Raises:
        ValueError: it quotes nothing.
    """
    text = _wanted(prompt, quotations, letters)
    if not text:
        raise ValueError(
            f"Prompt {prompt!r} quotes no text: write it like 'a sign that says \"open\"', or give the reward `text: open`."
        )
    return text


def _wanted(prompt: str, quotations: Quotations, letters: Letters) -> str:
    if quotations == "all":
        found = ["".join(one) for one in QUOTES.findall(prompt)]
    else:
        first = STRAIGHT.search(prompt) or QUOTES.search(prompt)
        found = [next(filter(None, first.groups()))] if first else []
    text = plain("".join(found), letters)
    return text if text.strip() else ""


def plain(text: str, letters: Letters = "lower") -> str:
    """A text as it is compared."""
    if letters == "lower":
        return text.replace(" ", "").lower()
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
