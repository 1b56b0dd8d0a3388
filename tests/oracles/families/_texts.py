"""Tiny tokenizers and text encoders of the kinds that pipelines come with, all of them made from vocabularies of our own.

A tokenizer knows single letters or bytes and no merges, so every prompt is spelled out and two prompts never share their ids. The
weights are drawn wide enough for a random network to tell prompts apart; the libraries' own 0.02 makes them all alike.
"""

from __future__ import annotations

import string

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.oracles.tiny import WIDTH, fresh, tiny_tokenizer

TURN, END_OF_TURN, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3_LAYERS = 28
"""Flux 2 klein reads the hidden states after 9, 18 and 27 layers."""


def clip_config(layers: int = 2) -> CLIPTextConfig:
    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_factor=10.0,
    )


def clip_encoder() -> CLIPTextModel:
    return CLIPTextModel(clip_config()).eval()


def clip_encoder_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config()).eval()


@fresh
def t5_tokenizer(length: int = 512) -> T5Tokenizer:
    """Pieces are single letters, with and without a space before them."""
    letters = string.ascii_lowercase + string.digits + ".,-"
    pieces = [(piece, -2.0) for letter in letters for piece in (letter, f"▁{letter}")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=length)


def t5_encoder(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


@fresh
def qwen_tokenizer() -> Qwen2Tokenizer:
    """The 256 bytes, and the marks of a chat."""
    vocabulary = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocabulary, [], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END_OF_TURN]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_settings(layers: int) -> dict[str, object]:
    """Of the language model, whatever is around it."""
    return {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": qwen_tokenizer().eos_token_id,
        "pad_token_id": qwen_tokenizer().pad_token_id,
    }


def qwen_3(layers: int = QWEN_3_LAYERS) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=True, **qwen_settings(layers))).eval()


def qwen_3_encoder(layers: int = 2) -> Qwen3Model:
    """Without a head for the next word."""
    return Qwen3Model(Qwen3Config(head_dim=8, **qwen_settings(layers))).eval()


def qwen_2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    """Language and vision; the pipelines that are asked for pictures use the first."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = Qwen2_5_VLConfig(
        text_config=qwen_settings(1) | {"rope_parameters": rope},
        vision_config=vision | {"fullatt_block_indexes": [0]},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
