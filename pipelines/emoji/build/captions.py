"""Every caption of the emoji grammar, and tokenizers that read it."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipelines.emoji import COLOURS, ICONS, NAMES, STYLES, caption

CONTEXT = 24  # tokens
LONGEST = 16  # tokens of the longest caption of the grammar
NO_TEXT, NO_NAME, NO_STYLE, NO_COLOUR = 0.1, 0.1, 0.4, 0.4  # how often a part of the caption is left out
START, END = "<|startoftext|>", "<|endoftext|>"

Merge = tuple[str, str]


class Captions:
    """All captions of the grammar; `index[name, style, colour]` is a place in `texts`, the last index meaning "left open"."""

    def __init__(self) -> None:
        self.texts = [
            "",
            *(
                caption(name, style, colour)
                for name in (*NAMES, None)
                for style in (*STYLES, None)
                for colour in (*COLOURS, None)
            ),
        ]
        self.index = torch.arange(1, len(self.texts)).view(len(NAMES) + 1, len(STYLES) + 1, len(COLOURS) + 1)

    def draw(self, name: Tensor, style: Tensor, colour: Tensor) -> Tensor:
        """Places (batch,) in `texts` of captions that leave parts out at random; 0 is the empty caption."""
        name, style, colour = (
            torch.where(torch.rand(len(index)) < rate, count, index)
            for index, rate, count in (
                (name, NO_NAME, len(NAMES)),
                (style, NO_STYLE, len(STYLES)),
                (colour, NO_COLOUR, len(COLOURS)),
            )
        )
        chosen = self.index[name, style, colour]
        chosen[torch.rand(len(chosen)) < NO_TEXT] = 0
        return chosen


def token_ids(texts: list[str]) -> Tensor:
    """Ids (texts, `CONTEXT`) by `tokenizer`; a caption that does not fit is an error."""
    ids = tokenizer()(texts, padding="max_length", return_tensors="pt").input_ids
    if ids.shape[1] > CONTEXT:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, but CONTEXT is {CONTEXT}; raise it or shorten names")
    return ids


def tokenizer() -> CLIPTokenizer:
    """CLIP's own byte-pair tokenizer, from the vocabulary that open_clip carries; pads to `CONTEXT` tokens."""
    return _tokenizer(_merges(), CONTEXT)


def short_tokenizer(first: int = 4096) -> CLIPTokenizer:
    """CLIP's tokenizer with fewer words and `LONGEST` tokens: its `first` most frequent merges, and those that captions need.

    Byte-pair encoding always applies the most frequent merge that it can. The merges it applies to those texts are all kept and
    none is added, so it cuts them into the same tokens; rarer words fall into smaller pieces. Only the ids are others.
    """
    merges, whole = _merges(), tokenizer()
    made = {"".join(pair): pair for pair in merges}
    needed = set(merges[:first])
    ids = whole([*Captions().texts, *(caption(name) for name in ICONS)]).input_ids
    for token in whole.convert_ids_to_tokens(sorted({i for row in ids for i in row})):
        needed |= _behind(token, made)
    return _tokenizer([pair for pair in merges if pair in needed], LONGEST)


def _behind(token: str, made: dict[str, Merge]) -> set[Merge]:
    """The merges that build `token` from single characters; `made` knows the last one of every token."""
    if token not in made:
        return set()
    pair = made[token]
    return {pair} | _behind(pair[0], made) | _behind(pair[1], made)


def _merges() -> list[Merge]:
    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    return [(a, b) for a, b in (line.split() for line in lines)]


def _tokenizer(merges: Iterable[Merge], length: int) -> CLIPTokenizer:
    characters, pairs = list(bytes_to_unicode().values()), list(merges)
    words = characters + [c + "</w>" for c in characters] + [a + b for a, b in pairs]
    vocabulary = {word: i for i, word in enumerate([*words, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)
