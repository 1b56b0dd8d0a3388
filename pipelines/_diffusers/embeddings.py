"""Prompts as a pipeline's own `encode_prompt` answers them, each encoded once and alone, by the names of its call's arguments.

`encode_prompt` answers in an order whose names are arguments of the pipeline's call, so a family is a tuple of names. A prompt is
encoded alone, whatever batch it comes in: an embedding does not depend on its neighbours, and replay meets the very numbers of the
rollout.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from pipelines._models.kept_embeddings import KeptEmbeddings

__all__ = ["PromptEmbeddings"]

REMEMBERED = 1024
"""Prompts whose embeddings are kept; one takes 236 kB at the size of Stable Diffusion 1.5."""

Row = dict[str, Any]
"""The arguments of the call for one prompt: tensors of batch 1, or lists of one tensor."""


@dataclass
class PromptEmbeddings:
    """The embeddings of a pipeline's prompts, and of its negative prompt where there is guidance.

    Args:
        names: What `encode_prompt` answers, in its order, by the names of the call's arguments; None for what is not passed on.
        options: Further arguments of `encode_prompt`.
        guided: Whether the call wants a negative prompt besides.
        negative: That prompt; None leaves it to the pipeline.
        kept: Where embeddings are kept from run to run.
    """

    names: Sequence[str | None]
    options: Mapping[str, Any]
    guided: bool
    negative: str | None = None
    kept: KeptEmbeddings | None = None
    _rows: dict[str, Row] = field(default_factory=dict)
    _negative: Row | None = None

    @torch.no_grad()
    def __call__(self, pipe: Any, prompts: Sequence[str], device: torch.device) -> Row:
        """Arguments of the call for these prompts, joined along the batch."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._rows:
                self._rows[prompt] = self._positive(pipe, device, prompt)
        rows = [self._rows[prompt] | self._against(pipe, device) for prompt in prompts]
        for prompt in list(self._rows)[:-REMEMBERED]:
            del self._rows[prompt]
        return {name: _joined(name, [row[name] for row in rows], _masked(rows[0])) for name in rows[0]}

    def mean(self, call: Row) -> Float[Tensor, "batch features"]:
        """Mean of each prompt's token embeddings, without padding; float32, detached."""
        tokens = call["prompt_embeds"]
        if isinstance(tokens, list):
            return torch.stack([row.detach().float().flatten(0, -2).mean(0) for row in tokens])
        mask = next((value for name, value in call.items() if "mask" in name and "negative" not in name), None)
        if mask is None:
            return tokens.detach().float().mean(1)
        kept = mask.to(tokens.device).float().reshape(*tokens.shape[:2], -1)[..., :1]  # AuraFlow's has one per feature
        return (tokens.detach().float() * kept).sum(1) / kept.sum(1).clamp(min=1)

    def _positive(self, pipe: Any, device: torch.device, prompt: str) -> Row:
        """Of one prompt; of the first one the pipeline is asked for the negative prompt too, where it answers both."""
        both = self.guided and self._negative is None and _knows_guidance(pipe)
        found = self._encoded(pipe, device, prompt, guided=both)
        negative = {name: value for name, value in found.items() if name.startswith("negative_")}
        if both:
            self._negative = negative
        return {name: value for name, value in found.items() if name not in negative}

    def _against(self, pipe: Any, device: torch.device) -> Row:
        """What guidance moves away from: the same for all prompts."""
        if not self.guided:
            return {}
        if self._negative is None:  # `encode_prompt` encodes one prompt at a time and knows nothing of guidance
            found = self._encoded(pipe, device, self.negative or "", guided=False)
            self._negative = {f"negative_{name}": value for name, value in found.items()}
        return self._negative

    def _encoded(self, pipe: Any, device: torch.device, prompt: str, *, guided: bool) -> Row:
        taken = inspect.signature(pipe.encode_prompt).parameters
        given = {
            "prompt": prompt,
            "prompt_2": None,
            "prompt_3": None,
            "device": device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": guided,
            "negative_prompt": self.negative if guided else None,
        }
        call = inspect.signature(
            type(pipe).__call__
        ).parameters  # its defaults are others than those of `encode_prompt`
        defaults = {name: argument.default for name, argument in call.items() if argument.default is not argument.empty}
        options = {name: value for name, value in (defaults | given | dict(self.options)).items() if name in taken}

        def encode() -> Row:
            answer = pipe.encode_prompt(**options)
            found = answer if isinstance(answer, tuple) else (answer,)
            row = {name: value for name, value in zip(self.names, found, strict=False) if name and value is not None}
            whole = {name: torch.ones_like(tokens[..., 0], dtype=torch.long) for name, tokens in self._all_kept(row)}
            return row | whole

        asked = {name: value for name, value in options.items() if name != "device"} | {"names": self.names}
        return encode() if self.kept is None else self.kept.found(pipe, asked, device, encode)

    def _all_kept(self, row: Row) -> Iterator[tuple[str, Tensor]]:
        """Masks that the pipeline leaves out because they keep every token, with the tokens."""
        for name in self.names:
            tokens = row.get("negative_prompt_embeds" if str(name).startswith("negative_") else "prompt_embeds")
            if name and "mask" in name and name not in row and tokens is not None:
                yield name, tokens


def _knows_guidance(pipe: Any) -> bool:
    return "do_classifier_free_guidance" in inspect.signature(pipe.encode_prompt).parameters


def _masked(row: Row) -> bool:
    return any("mask" in name for name in row)


def _joined(name: str, values: Sequence[Any], masked: bool) -> Any:
    """One after the other along the batch; shorter ones padded with zeros, which the mask leaves out.

    Raises:
        ValueError: they have different lengths, and there is no mask.
    """
    if isinstance(values[0], list):
        return [value for part in values for value in part]
    lengths = {value.shape[1] for value in values}
    if len(lengths) == 1:
        return torch.cat(list(values))
    if not masked:
        raise ValueError(
            f"{name}: prompts have embeddings of {min(lengths)} to {max(lengths)} tokens and this pipeline takes no mask, so they "
            "do not fit into one batch. Set train.micro_batch: 1."
        )
    longest = max(lengths)
    return torch.cat([pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])) for value in values])
