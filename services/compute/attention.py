"""Attention for one sequence on a CPU, registered with transformers under ATTENTION.

No mask is passed (transformers makes none for a name that it has no mask function for): queries are
the last positions of the keys, causal, no padding. The name must not contain "flash": transformers
would take it for FlashAttention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from common.kernels import mix, score
from services.compute.products import Bits, bits_of

ATTENTION = "single_sequence"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, heads, rows, width] over key, value [1, kv heads, tokens, width].

    Returns [1, rows, heads, width] in the query's dtype, and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1:
        return _attend_one(query[0, :, 0], key[0], value[0], scale), None
    # In fp16 and bf16, scaled_dot_product_attention is 5 to 12 times slower than in float32.
    q, k, v = query.float(), key.float(), value.float()
    rows, tokens = q.shape[2], k.shape[2]
    mask = None
    if 1 < rows < tokens:
        mask = torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=rows == tokens and rows > 1, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query [heads, width] over key, value [kv heads, tokens, width], all in float32."""
    (heads, width), tokens = query.shape, key.shape[1]
    scores, out = torch.empty(heads, tokens), torch.zeros(heads, width)
    score((query.float() * scale).numpy(), *_whole(key), scores.numpy())
    mix(torch.softmax(scores, dim=1).numpy(), *_whole(value), out.numpy())
    return out.to(query.dtype).view(1, 1, heads, width)


def _whole(states: torch.Tensor) -> tuple[Bits, int]:
    """The numbers of keys or values [kv heads, tokens, width], and for how many tokens a head has
    room in them: of the KV cache's views, all that lies before, between and behind."""
    heads, _, width = states.shape
    if states.stride()[1:] != (width, 1) or states.stride(0) % width:
        states = states.contiguous()
    room = states.stride(0) // width
    return bits_of(states.as_strided((heads, room, width), (room * width, width, 1))), room


AttentionInterface.register(ATTENTION, attend)
