"""The KV cache of one sequence: allocated once, filled from the front, never copied. It stays after
a request, so that the next one computes only what it does not begin with.

transformers' DynamicCache copies everything for each token, and its StaticCache attends over its
whole length; this one returns views of the part that is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer, [1, kv heads, context, width] each, from their first use."""

    def __init__(self, context: int):
        super().__init__()
        self.context = context
        self.filled = 0  # tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def room(like: torch.Tensor) -> torch.Tensor:
            return like.new_empty(1, like.shape[1], self.context, like.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the new tokens' states; returns views of all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.context

    def reset(self) -> None:
        self.filled = 0

    def crop(self, max_length: int) -> None:
        self.filled = min(self.filled, max_length)


def make_kv_cache(layers: int, context: int) -> Cache:
    """An empty KV cache for sequences of up to `context` tokens; `reset()` empties it again."""
    return Cache(layers=[KVLayer(context) for _ in range(layers)])


class Kept:
    """A KV cache, and which tokens' keys and values it holds."""

    def __init__(self, layers: int, context: int):
        self.cache = make_kv_cache(layers, context)
        self._tokens = torch.empty(context, dtype=torch.int64)
        self._count = 0

    def begin(self, prompt: torch.Tensor) -> int:
        """Keeps what `prompt`, int64 [tokens], begins with, and no more: how many tokens. The last
        of them is never kept: the logits after it are wanted.

        What a step that was given up left behind goes: only whole steps were held.
        """
        most = max(min(self._count, len(prompt) - 1), 0)
        differ = (self._tokens[:most] != prompt[:most]).nonzero()
        self._count = int(differ[0]) if len(differ) else most
        self.cache.crop(self._count)
        return self._count

    def hold(self, tokens: torch.Tensor, position: int) -> None:
        """A step is over: the states of `tokens`, from `position` on, are in the cache."""
        self._count = position + len(tokens)
        self._tokens[position : self._count] = tokens
