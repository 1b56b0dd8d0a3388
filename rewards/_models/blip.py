"""The network of ImageReward: BLIP's vision transformer, read by a BERT with cross-attention, and a linear head.

Modules carry the names of the published weights, so that a file is loaded as it is. Sizes are those of the file's tensors; the
numbers of heads, which no tensor shows, are the published ones.

Li et al., "BLIP", 2022, https://arxiv.org/abs/2201.12086; Devlin et al., "BERT", 2018, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from rewards._models.linear_head import LinearHead

__all__ = ["UNUSED", "BlipReward", "BlipSizes"]

UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",
)  # fmt: skip
"""What the published file holds besides: 0, 1, 2, …, and projections of BLIP's contrastive loss."""


@dataclass(frozen=True)
class BlipSizes:
    """Sizes of the network; the defaults are ImageReward's."""

    image: int = 224
    """Side of the input, pixels."""
    patch: int = 16
    width: int = 1024
    """Of the vision transformer."""
    depth: int = 24
    hidden: int = 4096
    heads: int = 16
    vocabulary: int = 30524
    """BERT's 30522 tokens, [DEC] and [ENC]."""
    positions: int = 512
    text_width: int = 768
    text_depth: int = 12
    text_hidden: int = 3072
    text_heads: int = 12

    @staticmethod
    def of(state: Mapping[str, Tensor], path: Path | str) -> BlipSizes:
        """Those of the tensors that were read from `path`; ValueError if they are not this network's."""
        vision, text = "blip.visual_encoder.", "blip.text_encoder."
        try:
            width, _, patch, _ = state[f"{vision}patch_embed.proj.weight"].shape
            places = state[f"{vision}pos_embed"].shape[1]
            vocabulary, text_width = state[f"{text}embeddings.word_embeddings.weight"].shape
            sizes = BlipSizes(
                image=patch * round((places - 1) ** 0.5),
                patch=patch,
                width=width,
                depth=_count(state, f"{vision}blocks."),
                hidden=len(state[f"{vision}blocks.0.mlp.fc1.bias"]),
                vocabulary=vocabulary,
                positions=len(state[f"{text}embeddings.position_embeddings.weight"]),
                text_width=text_width,
                text_depth=_count(state, f"{text}encoder.layer."),
                text_hidden=len(state[f"{text}encoder.layer.0.intermediate.dense.bias"]),
            )
        except KeyError as error:
            raise ValueError(f"{path} is not in the layout of ImageReward.pt: it has no {error}.") from None
        if sizes.width % sizes.heads or sizes.text_width % sizes.text_heads:
            raise ValueError(
                f"{path} has width {sizes.width} for images and {sizes.text_width} for texts; they must be multiples of "
                f"ImageReward's {sizes.heads} and {sizes.text_heads} heads."
            )
        return sizes


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, state) if found), default=-1)


class BlipReward(nn.Module):
    """Preprocessed images and their prompts' tokens -> the head's raw score."""

    def __init__(self, sizes: BlipSizes, mlp: LinearHead) -> None:
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": _Vision(sizes), "text_encoder": _Text(sizes)})
        self.mlp = mlp

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, " batch"]:
        """`mask` is true at tokens that are not padding."""
        features = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](images))
        return self.mlp(features[:, 0].float())  # at [CLS]; the published code, too, runs the head in float32


class _Vision(nn.Module):
    """Pre-norm vision transformer: all its tokens, with the class token first."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        places = (sizes.image // sizes.patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.empty(1, places, sizes.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch)})
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, sizes.hidden), "fc2": nn.Linear(sizes.hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](_attend(query, key, value, self.heads))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


class _Text(nn.Module):
    """BERT whose every layer also attends to the image's tokens."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(sizes.vocabulary, width),
                "position_embeddings": nn.Embedding(sizes.positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(sizes) for _ in range(sizes.text_depth))})

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        words, positions = self.embeddings["word_embeddings"](tokens), self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](words + positions)
        for layer in self.encoder["layer"].children():
            x = layer(x, mask[:, None, None, :], image)
        return x


class _Layer(nn.Module):
    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        width, hidden = sizes.text_width, sizes.text_hidden
        self.attention = _Attention(width, width, sizes.text_heads)
        self.crossattention = _Attention(width, sizes.width, sizes.text_heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image, None)
        return self.output["LayerNorm"](x + self.output["dense"](gelu(self.intermediate["dense"](x))))


class _Attention(nn.Module):
    """Post-norm attention of `x` to `source`."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(source, width), "value": nn.Linear(source, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.self["query"](x), self.self["key"](source), self.self["value"](source)
        return self.output["LayerNorm"](x + self.output["dense"](_attend(query, key, value, self.heads, mask)))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; channels are heads × head width."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
