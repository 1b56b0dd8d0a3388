"""Text encoders read a number of tokens and no more: which prompts are longer, and what of them is not read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.files.completeness import read_json
from diffusion_rtb.files.vocabulary import load_tokenizer

__all__ = ["say_what_is_cut"]


def say_what_is_cut(
    folder: Path, pipeline: str, tokenizers: Mapping[str, str], options: Mapping[str, Any], prompts: Sequence[str]
) -> None:
    """Warn of prompts that a pipeline's text encoders do not read to their end.

    Args:
        folder: Of the model.
        pipeline: Its class in diffusers, whose call may have a limit of its own; CLIP's is always the tokenizer's.
        tokenizers: Tokenizer -> the network behind it.
        options: Arguments of `encode_prompt`.
        prompts: Of a run.
    """
    import diffusers
    import transformers

    cls = getattr(diffusers, pipeline)
    taken = {**inspect.signature(cls.encode_prompt).parameters, **inspect.signature(cls.__call__).parameters}
    default = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
    most = options.get("max_sequence_length", default)
    index = read_json(folder / "model_index.json")
    for name, network in tokenizers.items():
        if not (folder / name).is_dir():
            continue  # a single file, whose tokenizer is not on the disk
        kind: Any = getattr(transformers, index[name][1])
        tokenizer = load_tokenizer(kind, folder / name)
        own = int(tokenizer.model_max_length)
        limit = own if most is None or "CLIP" in kind.__name__ else min(own, most)
        lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
        long = [i for i, length in enumerate(lengths) if length > limit]
        if long:
            warnings.warn(_sentence(tokenizer, prompts[long[0]], limit, network, len(long), len(prompts)), stacklevel=2)


def _sentence(tokenizer: Any, prompt: str, limit: int, network: str, count: int, of: int) -> str:
    words = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    extra = len(tokenizer(prompt)["input_ids"]) - len(words)
    unread = tokenizer.decode(words[limit - extra :]).strip()
    return (
        f"{count} of {of} prompts are longer than the {limit} tokens that {network} reads, and what is beyond is not seen by it. "
        f"Of the first, {prompt[:40]!r}, that is {unread[:80]!r}. Shorten them, if what is cut matters."
    )
