"""The network of ImageReward: BLIP's vision transformer, read by a BERT with cross-attention, and a linear head.

Both are those of transformers, under the names of the published weights, so that a file is loaded as it is. Sizes are those of the
file's tensors; the numbers of heads, which no tensor shows, are the published ones.

Li et al., "BLIP", 2022, https://arxiv.org/abs/2201.12086; Devlin et al., "BERT", 2018, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rewards._models.linear_head import LinearHead

__all__ = ["UNUSED", "BlipReward", "blip_sizes"]

UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",
)  # fmt: skip
"""What the published file holds besides: 0, 1, 2, …, and projections of BLIP's contrastive loss."""

HEADS, TEXT_HEADS = 16, 12

NAMES = {
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm",
    "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "post_layernorm": "norm",
}  # fmt: skip
"""Parts of the vision transformer's names: transformers' -> published."""


def blip_sizes(state: Mapping[str, Tensor], path: Path | str) -> tuple[dict[str, int], dict[str, int]]:
    """Of the vision transformer and of BERT, as transformers' configs call them, from the tensors that were read from `path`.

    Raises:
        ValueError: they are not this network's.
    """
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    try:
        width, _, patch, _ = state[f"{vision}patch_embed.proj.weight"].shape
        vocabulary, text_width = state[f"{text}embeddings.word_embeddings.weight"].shape
        seeing = {
            "image_size": patch * round((state[f"{vision}pos_embed"].shape[1] - 1) ** 0.5), "patch_size": patch,
            "hidden_size": width, "intermediate_size": len(state[f"{vision}blocks.0.mlp.fc1.bias"]),
            "num_hidden_layers": _count(state, f"{vision}blocks."), "num_attention_heads": HEADS,
        }  # fmt: skip
        reading = {
            "vocab_size": vocabulary, "max_position_embeddings": len(state[f"{text}embeddings.position_embeddings.weight"]),
            "hidden_size": text_width, "intermediate_size": len(state[f"{text}encoder.layer.0.intermediate.dense.bias"]),
            "num_hidden_layers": _count(state, f"{text}encoder.layer."), "num_attention_heads": TEXT_HEADS,
            "encoder_hidden_size": width,
        }  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path} is not in the layout of ImageReward.pt: it has no {error}.") from None
    if width % HEADS or text_width % TEXT_HEADS:
        raise ValueError(
            f"{path} has width {width} for images and {text_width} for texts; they must be multiples of ImageReward's {HEADS} "
            f"and {TEXT_HEADS} heads."
        )
    return seeing, reading


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, state) if found), default=-1)


class BlipReward(nn.Module):
    """Preprocessed images and their prompts' tokens -> the head's raw score.

    Args:
        seeing: Sizes of the vision transformer; see `blip_sizes`.
        reading: Sizes of BERT.
        mlp: The head.
    """

    def __init__(self, seeing: Mapping[str, int], reading: Mapping[str, int], mlp: LinearHead) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision = BlipVisionModel(BlipVisionConfig(**seeing, layer_norm_eps=1e-6))
        for layer in vision.encoder.layers:
            layer.self_attn = _Attention(seeing["hidden_size"])
        text = BlipTextModel(
            BlipTextConfig(**reading, is_decoder=True, bos_token_id=None, eos_token_id=None, sep_token_id=None),
            add_pooling_layer=False,
        )
        own = {_published(name): name for name in vision.state_dict()}
        vision.register_state_dict_post_hook(lambda _, state, prefix, *rest: _rename(state, prefix, _published))
        vision.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *rest: _rename(state, prefix, lambda name: own.get(name, name))
        )
        self.blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text})
        self.mlp = mlp

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, " batch"]:
        """`mask` is true at tokens that are not padding."""
        seen = self.blip["visual_encoder"](images).last_hidden_state
        # The positions are given because no file fills the buffer that the model would take them from.
        read = self.blip["text_encoder"](
            tokens,
            attention_mask=mask,
            position_ids=torch.arange(tokens.shape[1], device=tokens.device)[None],
            encoder_hidden_states=seen,
            is_decoder=False,  # every token attends to all
        ).last_hidden_state
        return self.mlp(read[:, 0].float())  # at [CLS]; the published code, too, runs the head in float32


class _Attention(nn.Module):
    """What transformers' has for BLIP, by torch's fused kernel: its own forms the matrix, which takes a tenth longer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: Float[Tensor, "batch tokens width"], **_: Any) -> tuple[Tensor, None]:
        """As the layers of `BlipVisionModel` call it."""
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def _published(name: str) -> str:
    for theirs, published in NAMES.items():
        name = name.replace(theirs, published)
    return name


def _rename(state: dict[str, Any], prefix: str, new: Callable[[str], str]) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + new(name.removeprefix(prefix))] = state.pop(name)
