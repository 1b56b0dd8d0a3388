"""ImageReward: how people rank an image for its prompt, by BLIP with a head trained on their rankings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_rtb.files.completeness import check_finite
from rewards._models.blip import UNUSED, BlipReward, blip_sizes
from rewards._models.linear_head import LinearHead
from rewards._models.network import Dtype, NetworkReward
from rewards._models.preprocess import Preprocess
from rewards._models.weights import check_weights, fetch, fill, read_weights

__all__ = ["ImageReward"]

WEIGHTS, TOKENIZER = "hf-hub:THUDM/ImageReward/ImageReward.pt", "bert-base-uncased"

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the published training data."""

REMEDY = f"It must be that of {TOKENIZER!r}: give a folder with its vocab.txt where the hub is out of reach."

LENGTH = 35
"""Tokens of a prompt, padded or cut."""

PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageReward(NetworkReward):
    r"""r(x) = (head(BERT(prompt, ViT(x))_[CLS]) - mean) / std: about zero mean and unit spread, most images -2.3 to 2.

    ImageReward-v1.0: BLIP's ViT-L/16 at 224 pixels, BERT-base with cross-attention to it, five linear layers.

    Xu et al., "ImageReward", 2023, https://arxiv.org/abs/2304.05977; weights Apache-2.0.

    Args:
        weights: The published `ImageReward.pt`: a local path or `hf-hub:OWNER/NAME/FILE` (default, 1.8 GB).
        tokenizer: BERT's, uncased: a hub id, or a folder with `vocab.txt`.
        scale: Factor on the reward.
        grad: Whether r is differentiable in the images.
        dtype: Of transformers; the head is float32.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        weights: str = WEIGHTS,
        tokenizer: str = TOKENIZER,
        *,
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        check_weights(weights)
        folder = Path(tokenizer)
        if folder.is_dir() and not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise FileNotFoundError(f"{folder} is not a tokenizer's: it has no vocab.txt.")
        if not folder.is_dir() and (tokenizer.startswith((".", "/")) or tokenizer.count("/") > 1):
            raise FileNotFoundError(f"tokenizer is {tokenizer!r}: neither a folder nor a hub id such as {TOKENIZER!r}.")
        self.weights, self._tokenizer_name = weights, tokenizer
        self.device = torch.device("cpu")

    @cached_property
    def network(self) -> BlipReward:
        """BLIP with its head, loaded; `preprocess` and `tokenizer` are set beside it."""
        path = fetch(self.weights)
        state = read_weights(path)
        seeing, reading = blip_sizes(state, path)
        with torch.device("meta"):  # no time is spent on values that are overwritten
            empty = BlipReward(seeing, reading, LinearHead.sized(state, path, "mlp."))
        network = empty.to_empty(device="cpu")
        fill(network, state, path, "ImageReward", UNUSED, others="told")
        network.requires_grad_(False).eval().blip.to(self.precision)
        check_finite(network, path)
        self.preprocess = Preprocess((seeing["image_size"],) * 2, (seeing["image_size"],) * 2, *PIXELS)
        self.tokenizer = _tokenizer(self._tokenizer_name, reading["vocab_size"])
        return network

    def load_weights(self) -> None:
        _ = self.network

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        network = self.network
        if self.device != images.device:
            network.to(images.device)
            self.device = images.device
        tokens, mask = (x.to(images.device) for x in self._tokens(prompts))
        parts = zip(images.split(self.batch), tokens.split(self.batch), mask.split(self.batch), strict=True)
        raw = torch.cat([network(self.preprocess(x).to(self.precision), t, m) for x, t, m in parts])
        return self.scale * (raw - MEAN) / STD

    def _tokens(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Tokens, and where they are not padding."""
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"].bool()


def _tokenizer(name: str, rows: int) -> Any:
    """BERT's with BLIP's two tokens behind its own; `rows` are those of the embedding."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The tokenizer {name!r} cannot be loaded: {reason} {REMEDY}") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != rows:  # transformers 5 makes an empty tokenizer of a name that it cannot reach
        raise ValueError(
            f"The tokenizer {name!r} has {len(tokenizer)} tokens with [DEC] and [ENC], the weights embed {rows}. {REMEDY}"
        )
    return tokenizer
