"""Attention of each sequence on a CPU, registered with transformers under ATTENTION.

No mask is passed (transformers makes none for a name that it has no mask function for): queries are
the last positions of the keys, causal, no padding. The name must not contain "flash": transformers
would take it for FlashAttention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from common.heads import Held, attend_job
from common.jobs import Job, listed, perform
from services.compute.blocks import Share, alone

ATTENTION = "single_sequence"
SLOWER = 3  # at most, than products: how long a byte of keys and values takes
TOGETHER = 1 << 16  # scores that are made by one call, if a head has fewer


class Each(NamedTuple):
    """What several sequences hold, of each of which one token is new, and the new ones' keys and
    values, [sequences, kv heads, width] each: `held` has addresses in them."""

    held: list[Held]
    keys: torch.Tensor
    values: torch.Tensor


class Stretch(NamedTuple):
    """Of a block of several sequences' tokens what is one's: how many of the queries, and keys and
    values [kv heads, tokens, width] each."""

    rows: int
    keys: torch.Tensor
    values: torch.Tensor


Theirs = Each | tuple[Stretch, ...]
"""What several sequences hold: a token of each is new, or some tokens."""
Do = Callable[[Job, int], None]
"""Has a job done that goes through so many bytes: see Products.do."""


def do_alone(job: Job, size_bytes: int) -> None:
    """A Do: all by this thread."""
    perform(listed([job])[1:])


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Theirs,
    value: torch.Tensor | Theirs,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    share: Share = alone,
    do: Do = do_alone,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, heads, rows, width] over key, value [1, kv heads, tokens, width].

    Returns [1, rows, heads, width] in the query's dtype, and no weights. Of several sequences the
    queries lie one behind another, and each has keys and values of its own. Where each has one
    query, that is a job, which is given to `do`; of a block of tokens the heads are shared by
    `share`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query[0]
    if isinstance(key, torch.Tensor):
        assert isinstance(value, torch.Tensor)
        return _attend_part(query, key[0], value[0], scale, share, do)[None], None
    if isinstance(key, Each):
        return _attend_each(query.transpose(0, 1), key.held, key.keys[0], scale, do)[None], None
    outs, first = [], 0
    for theirs in key:
        end = first + theirs.rows
        part = query[:, first:end], theirs.keys, theirs.values
        outs.append(_attend_part(*part, scale, share, do))
        first = end
    return torch.cat(outs)[None], None


def _attend_each(
    query: torch.Tensor, held: Sequence[Held], like: torch.Tensor, scale: float, do: Do
) -> torch.Tensor:
    """One query of each sequence, [sequences, heads, width], over what it holds, in float32:
    [sequences, heads, width]. Keys and values are `like` [kv heads, ...]."""
    out = torch.empty(query.shape)
    wide = (query.float() * scale).contiguous()
    number_format = str(like.dtype).removeprefix("torch.")
    job = attend_job(wide.numpy(), held, len(like), number_format, out.numpy())
    token_bytes = 2 * len(like) * query.shape[-1] * like.element_size()
    do(job, SLOWER * token_bytes * sum(each.tokens for each in held))
    return out.to(query.dtype)


def _attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, share: Share, do: Do
) -> torch.Tensor:
    """Queries [heads, rows, width] of one sequence over its key, value [kv heads, tokens, width]:
    [rows, heads, width]."""
    if query.shape[1] > 1:
        return _attend_block(query, key, value, scale, share)
    (_, tokens, width), stride = key.shape, key.stride()
    if stride != value.stride() or stride[1:] != (width, 1) or stride[0] % width:
        key, value = key.contiguous(), value.contiguous()
    held = Held(key.data_ptr(), value.data_ptr(), key.stride(0) // width, tokens)
    return _attend_each(query.transpose(0, 1), [held], key, scale, do)


def _attend_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, share: Share
) -> torch.Tensor:
    """A block of queries [heads, rows, width] over key, value [kv heads, tokens, width].

    In float32: scaled_dot_product_attention is 5 to 12 times slower in fp16 and bf16."""
    (heads, rows, width), (kv_heads, tokens) = query.shape, key.shape[:2]
    group, causal = heads // kv_heads, rows == tokens
    mask = None if causal else torch.full((rows, tokens), -torch.inf).triu_(tokens - rows + 1)
    out = query.new_empty(rows, heads, width)

    def work(first: int, end: int) -> None:
        q = query[first * group : end * group].float()
        k, v = key[first:end].float(), value[first:end].float()
        made = F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        out[:, first * group : end * group] = made[0].transpose(0, 1)

    share(kv_heads, max(TOGETHER // (group * rows * tokens), 1), work)
    return out


AttentionInterface.register(ATTENTION, attend)
