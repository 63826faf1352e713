"""Attention of each sequence on a CPU, registered with transformers under ATTENTION.

No mask is passed (transformers makes none for a name that it has no mask function for): queries are
the last positions of the keys, causal, no padding. The name must not contain "flash": transformers
would take it for FlashAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from common.kernels import mix, score
from services.compute.blocks import Share, alone
from services.compute.products import SHARED_BYTES_MIN, Bits, bits_of

ATTENTION = "single_sequence"
TOGETHER = 1 << 16  # scores that are made by one call, if a head has fewer


class Held(NamedTuple):
    """Keys and values of one sequence, as numbers [kv heads × room × width] each, and how many
    tokens of the room are filled."""

    keys: Bits
    values: Bits
    room: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Of what is filled."""
        return (self.keys.nbytes + self.values.nbytes) // self.room * self.tokens


class Stretch(NamedTuple):
    """Of a block of several sequences' tokens what is one's: how many of the queries, and keys and
    values [kv heads, tokens, width] each."""

    rows: int
    keys: torch.Tensor
    values: torch.Tensor


Theirs = tuple[Held, ...] | tuple[Stretch, ...]
"""What several sequences hold: a token of each is new, or some tokens."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Theirs,
    value: torch.Tensor | Theirs,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    share: Share = alone,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, heads, rows, width] over key, value [1, kv heads, tokens, width].

    Returns [1, rows, heads, width] in the query's dtype, and no weights. Of a block of tokens the
    heads are shared by `share`. Of several sequences the queries lie one behind another, and each
    has keys and values of its own: with one query each the sequences are shared, too.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query[0]
    if isinstance(key, torch.Tensor):
        assert isinstance(value, torch.Tensor)
        return _attend_part(query, key[0], value[0], scale, share)[None], None
    held = [theirs for theirs in key if isinstance(theirs, Held)]
    if held:
        return _attend_each(query.transpose(0, 1), held, scale, share)[None], None
    outs, first = [], 0
    for theirs in key:
        assert isinstance(theirs, Stretch)
        end = first + theirs.rows
        part = query[:, first:end], theirs.keys, theirs.values
        outs.append(_attend_part(*part, scale, share))
        first = end
    return torch.cat(outs)[None], None


def _attend_each(
    query: torch.Tensor, held: Sequence[Held], scale: float, share: Share
) -> torch.Tensor:
    """One query of each sequence, [sequences, heads, width], over what it holds; as `_attend_one`
    has it, to the bit: [sequences, heads, width]."""
    wide = (query.float() * scale).numpy()
    out = torch.zeros(query.shape)
    mixed = out.numpy()

    def work(first: int, end: int) -> None:
        for i in range(first, end):
            scores = torch.empty(query.shape[1], held[i].tokens)
            score(wide[i], held[i].keys, held[i].room, scores.numpy())
            mix(torch.softmax(scores, dim=1).numpy(), held[i].values, held[i].room, mixed[i])

    if sum(each.nbytes for each in held) < SHARED_BYTES_MIN:
        work(0, len(query))
    else:
        share(len(query), 1, work)
    return out.to(query.dtype)


def _attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, share: Share
) -> torch.Tensor:
    """Queries [heads, rows, width] of one sequence over its key, value [kv heads, tokens, width]:
    [rows, heads, width]."""
    if query.shape[1] == 1:
        return _attend_one(query[:, 0], key, value, scale)[None]
    return _attend_block(query, key, value, scale, share)


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


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query [heads, width] over key, value [kv heads, tokens, width], all in float32."""
    (heads, width), tokens = query.shape, key.shape[1]
    scores, out = torch.empty(heads, tokens), torch.zeros(heads, width)
    score((query.float() * scale).numpy(), *_whole(key), scores.numpy())
    mix(torch.softmax(scores, dim=1).numpy(), *_whole(value), out.numpy())
    return out.to(query.dtype)


def _whole(states: torch.Tensor) -> tuple[Bits, int]:
    """The numbers of keys or values [kv heads, tokens, width], and for how many tokens a head has
    room in them: of the KV cache's views, all that lies before, between and behind."""
    heads, _, width = states.shape
    if states.stride()[1:] != (width, 1) or states.stride(0) % width:
        states = states.contiguous()
    room = states.stride(0) // width
    return bits_of(states.as_strided((heads, room, width), (room * width, width, 1))), room


AttentionInterface.register(ATTENTION, attend)
