"""Gemma 2 and UMT5 as Sana, Lumina 2 and Wan have them, tiny; see `_texts.py`."""

from __future__ import annotations

import string

from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, UMT5Config, UMT5EncoderModel

from tests.oracles.families._texts import t5_tokenizer
from tests.oracles.tiny import WIDTH, fresh

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


@fresh
def gemma_tokenizer() -> GemmaTokenizer:
    """Printable letters; its texts may have any length, as the published tokenizer says."""
    letters = [letter for letter in string.printable if letter != " "]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate((*SPECIAL, "▁", *letters))})


def gemma_encoder() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        sliding_window=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.3,
    )
    return Gemma2Model(config).eval()


def umt5_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval()
