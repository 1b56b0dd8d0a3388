"""The two frozen text encoders of the `emoji_flow` prior: the emoji prior's and emoji-clip's, with fewer words.

Nine tenths of both are embeddings of words that no caption has. `captions.short_tokenizer` cuts captions into the same tokens
out of a tenth of the vocabulary, so only the rows of those tokens are kept, and what is computed stays the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.emoji.build.captions import END, START, short_tokenizer, tokenizer

PAD = "!"  # open_clip pads with id 0, which is this word; so does the second tokenizer of Stable Diffusion 3


def of_prior(folder: Path, short: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The text encoder of the exported emoji prior; it was trained without a projection, so that is the identity."""
    trained = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    values, width = trained.config.to_dict(), trained.config.hidden_size
    model = CLIPTextModelWithProjection(CLIPTextConfig(**(values | _ids(short) | {"projection_dim": width})))
    state = {"text_model." + k.removeprefix("text_model."): v for k, v in trained.state_dict().items()}
    words = "text_model.embeddings.token_embedding.weight"
    state[words] = state[words][kept(short)]
    model.load_state_dict(state | {"text_projection.weight": torch.eye(width)})
    return model.requires_grad_(False).eval()


def of_clip(folder: Path, short: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The text tower of emoji-clip, an open_clip model, in transformers' layout."""
    clip = open_clip.create_model(f"local-dir:{folder}").float()
    width, layers = clip.token_embedding.embedding_dim, len(clip.transformer.resblocks)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=clip.text_projection.shape[1],
        num_hidden_layers=layers,
        num_attention_heads=clip.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=len(clip.positional_embedding),
        hidden_act="gelu",
        **_ids(short),
    )
    model = CLIPTextModelWithProjection(config)
    state = {
        "text_projection.weight": clip.text_projection.T,
        "text_model.embeddings.token_embedding.weight": clip.token_embedding.weight[kept(short)],
        "text_model.embeddings.position_embedding.weight": clip.positional_embedding,
    }
    state |= _renamed(clip.ln_final, "text_model.final_layer_norm")
    for i, block in enumerate(clip.transformer.resblocks):
        state |= _layer(block, f"text_model.encoder.layers.{i}")
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _layer(block: Any, name: str) -> dict[str, Tensor]:
    """One residual block; open_clip keeps the three projections of attention in one matrix."""
    attention: torch.nn.MultiheadAttention = block.attn
    state: dict[str, Tensor] = {}
    for part, weight, bias in zip(
        ("q_proj", "k_proj", "v_proj"), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    ):
        state |= {f"{name}.self_attn.{part}.weight": weight, f"{name}.self_attn.{part}.bias": bias}
    for module, title in (
        (attention.out_proj, "self_attn.out_proj"),
        (block.ln_1, "layer_norm1"),
        (block.ln_2, "layer_norm2"),
        (block.mlp.c_fc, "mlp.fc1"),
        (block.mlp.c_proj, "mlp.fc2"),
    ):
        state |= _renamed(module, f"{name}.{title}")
    return state


def _renamed(module: torch.nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for k, v in module.state_dict().items()}


def kept(short: CLIPTokenizer) -> Tensor:
    """Ids in CLIP's own vocabulary of the words of `short`, in its order."""
    return torch.tensor(tokenizer().convert_tokens_to_ids(short.convert_ids_to_tokens(list(range(len(short))))))


def _ids(short: CLIPTokenizer) -> dict[str, int]:
    start, end = short.convert_tokens_to_ids([START, END])
    return {"vocab_size": len(short), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The short tokenizer twice, the second padding as open_clip does."""
    first, second = short_tokenizer(), short_tokenizer()
    second.pad_token = PAD
    return first, second
