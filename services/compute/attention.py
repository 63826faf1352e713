"""Attention for one sequence on a CPU, registered with transformers under ATTENTION.

No mask is passed (transformers makes none for a name that it has no mask function for): queries are
the last positions of the keys, causal, no padding. The name must not contain "flash": transformers
would take it for FlashAttention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from services.compute.kv import rounded_up

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
    """One query [heads, width] in half precision over key, value [kv heads, tokens, width].

    Batched products by oneDNN, which makes and keeps a kernel for each number of tokens that it
    meets: so they run over a multiple of KV_STEP, and what is no token yet gets no weight.
    """
    heads, width = query.shape
    kv_heads, tokens, _ = key.shape
    key, value = rounded_up(key), rounded_up(value)
    query = query * scale  # before the product: half precision has digits for small scores only
    scores = torch.bmm(key, query.view(kv_heads, -1, width).mT).float()
    scores[:, tokens:] = -math.inf
    weights = torch.softmax(scores, dim=1).to(query.dtype)
    return torch.bmm(weights.mT, value).view(1, 1, heads, width)


AttentionInterface.register(ATTENTION, attend)
