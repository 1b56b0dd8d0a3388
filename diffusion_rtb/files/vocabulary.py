"""Does a tokenizer have its vocabulary, and does the text network have a row for all of it?

Libraries make an empty tokenizer where a file is missing: every text becomes the same unknown tokens, without a word.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

__all__ = ["check_rows", "check_tokenizer", "load_tokenizer"]

PROBES = ("cat", "dog", "a red cup on a table", "12", "猫")
"""Texts of which a tokenizer with a vocabulary knows more than one token, whatever its language."""

PADDING = 512
"""Rows that an embedding may have beyond its vocabulary: some are padded to a multiple of a power of two."""

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
AGAIN = "copy or download the folder again."


def load_tokenizer(tokenizer_class: Any, name: str | Path, **options: Any) -> Any:
    """A tokenizer of transformers that has its vocabulary, from a folder or hub id `name`; options are of `from_pretrained`.

    Raises:
        ValueError: files are missing or damaged, or the vocabulary is empty.
        ImportError: it needs a package that is not installed.
    """
    if Path(name).is_dir():
        _check_files(Path(name))
    try:
        tokenizer = tokenizer_class.from_pretrained(name, **options)
    except ImportError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The tokenizer of {str(name)!r} cannot be loaded: {reason} Its files must be whole: {AGAIN}"
        ) from error
    check_tokenizer(tokenizer, name)
    return tokenizer


def _check_files(folder: Path) -> None:
    here = [name for name in FILES if (folder / name).is_file()]
    if not here:
        raise ValueError(
            f"{folder} has no vocabulary: it needs tokenizer.json, or vocab.json and merges.txt, or vocab.txt; {AGAIN}"
        )
    if "tokenizer.json" not in here and ("vocab.json" in here) != ("merges.txt" in here):
        lost = "merges.txt" if "vocab.json" in here else "vocab.json"
        raise ValueError(f"{folder} has no {lost}, without which its tokenizer splits texts otherwise; {AGAIN}")


def check_tokenizer(tokenizer: Any, name: str | Path) -> None:
    """Refuse a tokenizer of transformers, from a folder or hub id `name`, whose vocabulary is empty or cut; ValueError."""
    met = {i for text in PROBES for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    if len(met) < 2 or met == {getattr(tokenizer, "unk_token_id", None)}:
        raise ValueError(
            f"The tokenizer of {str(name)!r} has no vocabulary ({len(tokenizer)} tokens): all texts are the same to it. Its "
            f"tokenizer.json, or vocab.json and merges.txt, is missing or empty; {AGAIN}"
        )
    if cut := _unreachable(tokenizer):
        raise ValueError(
            f"The tokenizer of {str(name)!r} cannot make {len(cut)} of its own tokens (such as {cut[0]!r}): merges.txt is cut off "
            f"or of another vocabulary; {AGAIN}"
        )


def check_rows(
    tokenizer: Any, name: str | Path, rows: int | None, positions: int | None = None, network: str = "the text network"
) -> None:
    """Refuse a tokenizer whose tokens mean nothing to the network behind it.

    Args:
        tokenizer: Of transformers.
        name: Its folder or hub id.
        rows: Tokens that the network embeds; None if unknown.
        positions: Tokens that it takes; given where texts are padded to the tokenizer's own `model_max_length`.
        network: For messages.

    Raises:
        ValueError: it has tokens beyond the rows, or texts would be longer than the network takes.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if rows is not None and i >= rows)
    if beyond:
        raise ValueError(
            f"The tokenizer of {str(name)!r} has {len(beyond)} tokens (first: {beyond[0][1]!r}, number {beyond[0][0]}) beyond the "
            f"{rows} rows of {network}: they are not of one model. After adding tokens call "
            "resize_token_embeddings(len(tokenizer)), load what was learned for them, and save both."
        )
    if rows is not None and len(tokenizer) < rows - PADDING:
        warnings.warn(
            f"The tokenizer of {str(name)!r} has {len(tokenizer)} tokens, {network} embeds {rows}: it looks like another model's.",
            stacklevel=3,
        )
    if positions is not None and tokenizer.model_max_length > positions:
        length = tokenizer.model_max_length
        raise ValueError(
            f"The tokenizer of {str(name)!r} pads texts to {'any length' if length > 10**9 else length}, {network} takes "
            f"{positions} tokens: its tokenizer_config.json must be there and say model_max_length: {positions}."
        )


def _unreachable(tokenizer: Any) -> list[str]:
    """Of a CLIP tokenizer, whose tokens are bytes, merges of two tokens, or added: those that are neither."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        return []
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    made = {"".join(pair) for pair in pairs} | set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    return [token for token in model["vocab"] if token not in made and len(token.removesuffix("</w>")) > 1]
