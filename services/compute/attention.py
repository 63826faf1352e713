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
    if query.shape[2] == 1 and query.dtype != torch.float32:
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
    """One query [heads, width] in half precision, a head at a time.

    `mv` over a head's keys and `embedding_bag` over its values run at memory speed in half
    precision, where batched matrix products and scaled_dot_product_attention do not.
    """
    heads, width = query.shape
    query = query * scale  # before the product: half precision has digits for small scores only
    per_kv = heads // key.shape[0]
    out = torch.empty(1, 1, heads, width, dtype=query.dtype)
    every, start = torch.arange(key.shape[1]), torch.zeros(1, dtype=torch.int64)
    for head in range(heads):
        scores = torch.mv(key[head // per_kv], query[head]).float()
        weights = torch.softmax(scores, dim=0).to(query.dtype)
        out[0, 0, head] = F.embedding_bag(
            every, value[head // per_kv], start, mode="sum", per_sample_weights=weights
        )[0]
    return out


AttentionInterface.register(ATTENTION, attend)
