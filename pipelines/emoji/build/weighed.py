"""Joint attention in which many equal tokens are one: how the flow prior is trained without T5."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn


class Weighed(JointAttnProcessor2_0):  # type: ignore[misc]
    """Joint attention in which the last context token counts as often as `count` says, per sample (batch,).

    Without T5 the pipeline appends `max_sequence_length` zero vectors to the caption. They are equal and have no position, so
    they stay equal in every layer, and n of them weigh in a softmax like one whose logit is log n higher. Training on
    that one instead of n makes a step four times as fast, and n can be drawn at random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.ones(1)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The images' and the captions' tokens after attending to both."""
        image, context = hidden_states, encoder_hidden_states
        query = (attn.norm_q, attn.to_q, attn.norm_added_q, attn.add_q_proj)
        key = (attn.norm_k, attn.to_k, attn.norm_added_k, attn.add_k_proj)
        value = (nn.Identity(), attn.to_v, nn.Identity(), attn.add_v_proj)
        q, k, v = (
            torch.cat([norm(_heads(attn, to(image))), norm_added(_heads(attn, to_added(context)))], 2)
            for norm, to, norm_added, to_added in (query, key, value)
        )
        bias = q.new_zeros(len(q), 1, 1, k.shape[2])
        bias[..., -1] = self.count.log().to(q.dtype)[:, None, None]
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)  # so short that the fused kernel is slower
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        image, context = mixed.split([image.shape[1], context.shape[1]], 1)
        return attn.to_out[0](image), context if attn.context_pre_only else attn.to_add_out(context)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
