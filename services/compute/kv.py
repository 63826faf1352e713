"""The KV cache: keys and values of the sequences that run, and of some that are over, so that a
request computes only what none of them begins with.

transformers' DynamicCache copies everything for each token, and its StaticCache attends over its
whole length; a layer here is filled from the front, never copied, and returns views of the part
that is filled. It has addresses for the longest sequence, and memory for what was written: pages
that come with their first use and go at once when they are given back. So there is room for so
many tokens, whoever's they are.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from common.heads import Held
from common.limits import KEPT_MAX
from common.plan import kv_room
from services.compute.attention import Each, Stretch, Theirs

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer of one sequence, [1, kv heads, context, width] each."""

    def __init__(self, context: int):
        super().__init__()
        self.context = kv_room(context)
        self.filled = 0  # tokens
        self._touched = 0  # tokens that may have memory
        self._regions: list[mmap.mmap] = []
        self._addresses: tuple[int, int]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._pages(key_states), self._pages(value_states)
        self._addresses = self.keys.data_ptr(), self.values.data_ptr()
        self.is_initialized = True

    def _pages(self, like: torch.Tensor) -> torch.Tensor:
        shape = 1, like.shape[1], self.context, like.shape[3]
        size = like.element_size() * like.shape[1] * self.context * like.shape[3]
        region = mmap.mmap(-1, size, flags=_PRIVATE)
        with contextlib.suppress(AttributeError, OSError):  # where there are no huge ones
            region.madvise(mmap.MADV_NOHUGEPAGE)  # a few tokens would fill one
        self._regions.append(region)
        return torch.frombuffer(region, dtype=like.dtype).view(shape)

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
        self.filled, self._touched = end, max(self._touched, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def append(self, new_key: int, new_value: int) -> Held:
        """Makes a place for one token, whose states lie at these addresses; returns what is filled.
        Not the first: the prompt came before it."""
        self.filled += 1
        self._touched = max(self._touched, self.filled)
        return Held(*self._addresses, self.context, self.filled, new_key, new_value)

    def copy(self, other: KVLayer, tokens: int) -> None:
        """An empty one gets what `other` holds of its first `tokens`."""
        if tokens:
            assert other.keys is not None
            assert other.values is not None
            self.update(other.keys[:, :, :tokens], other.values[:, :, :tokens])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.context

    def reset(self) -> None:
        self.crop(0)

    def crop(self, max_length: int) -> None:
        """Keeps so many tokens, and gives back the memory of the others."""
        self.filled = min(self.filled, max_length)
        if self._touched > kv_room(self.filled):
            self._touched = kv_room(self.filled)
            for region in self._regions:
                self._give_back(region)

    def _give_back(self, region: mmap.mmap) -> None:
        assert self.keys is not None
        head = len(region) // self.keys.shape[1]
        for start in range(0, len(region), head):
            begin = start + head // self.context * self._touched
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, of this head alone
            end = (start + head) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                region.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class SharedLayer(CacheLayerMixin):
    """One layer of several sequences in a step that they share: some new tokens of each."""

    def __init__(self, layers: Many[KVLayer], counts: Many[int]):
        """`counts`: how many tokens of each are new; they lie one sequence behind another."""
        super().__init__()
        self._layers, self._counts = layers, counts
        # All are past their prompts: these states are not their first.
        self._one_each = max(counts) == 1 and all(layer.filled for layer in layers)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(  # type: ignore[override]  # what it returns goes to our attention alone
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Theirs, Theirs]:
        """Appends states [1, kv heads, new tokens, width], to each sequence its own; returns what
        each holds, twice: keys and values are together."""
        held = (self._append_one_each if self._one_each else self._append)(key_states, value_states)
        return held, held

    def _append_one_each(self, keys: torch.Tensor, values: torch.Tensor) -> Each:
        rows = [states[0].transpose(0, 1).contiguous() for states in (keys, values)]
        size = rows[0].element_size() * rows[0][0].numel()
        places = [range(row.data_ptr(), row.data_ptr() + len(row) * size, size) for row in rows]
        each = zip(self._layers, *places, strict=True)
        return Each([layer.append(key, value) for layer, key, value in each], *rows)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Stretch, ...]:
        parts, first = list[Stretch](), 0
        for layer, count in zip(self._layers, self._counts, strict=True):
            new = slice(first, first + count)
            held = layer.update(keys[:, :, new], values[:, :, new])
            parts.append(Stretch(count, held[0][0], held[1][0]))
            first += count
        return tuple(parts)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(layer.filled for layer in self._layers)

    def get_max_length(self) -> int:
        return min(layer.context for layer in self._layers)


@dataclass(eq=False)
class Sequence:
    """A KV cache, and which tokens' keys and values it holds."""

    layers: list[KVLayer]
    tokens: torch.Tensor  # int64 [room]; filled up to `count`
    count: int = 0

    @property
    def cache(self) -> Cache:
        """As transformers takes it."""
        return Cache(layers=list(self.layers))

    @property
    def room(self) -> int:
        """Of the pool's, tokens."""
        return len(self.tokens)

    def common(self, prompt: torch.Tensor) -> int:
        """How many tokens it holds of those that `prompt` int64 [tokens] begins with. Its last is
        never among them: the logits after it are wanted."""
        most = max(min(self.count, len(prompt) - 1), 0)
        differ = (self.tokens[:most] != prompt[:most]).nonzero()
        return int(differ[0]) if len(differ) else most

    def hold(self, tokens: torch.Tensor, position: int) -> None:
        """A step is over: the states of `tokens`, from `position` on, are in the cache."""
        self.count = position + len(tokens)
        self.tokens[position : self.count] = tokens

    def keep(self, count: int, room: int) -> None:
        """Keeps the first `count` tokens, and has room for so many. What a step that was given up
        left behind goes: only whole steps were held."""
        for layer in self.layers:
            layer.crop(count)
        self.count = count
        tokens = self.tokens.new_empty(room)
        tokens[:count] = self.tokens[:count]
        self.tokens = tokens


class Sequences:
    """Room for keys and values of `room` tokens, and who has it: sequences that run, and those that
    are kept when their request is over, until the room is wanted."""

    def __init__(self, layers: int, context: int, room: int, reuse: bool = True):
        """`context`: tokens of the longest sequence. Without `reuse` nothing is kept."""
        self.running: list[Sequence] = []
        self.kept: list[Sequence] = []  # the longest unused first
        self._layers, self._context, self._room, self._reuse = layers, context, room, reuse

    def begin(self, prompt: torch.Tensor, tokens: int) -> Sequence | None:
        """A sequence for a request of so many tokens, prompt and answer. It holds what `prompt`
        int64 [tokens] has in common with another. None: those that run leave no room.

        A kept sequence is taken over; but where `prompt` shares only its lesser half, and there is
        room for both, and of one that runs, the beginning is copied.
        """
        room = kv_room(tokens)
        if _rooms(self.running) + room > self._room:
            return None
        found, common = self._find(prompt)
        taken = found in self.kept and (
            2 * common >= found.count or _rooms(self.running + self.kept) + room > self._room
        )
        if taken:
            self.kept.remove(found)
        while self.kept and _rooms(self.running + self.kept) + room > self._room:
            del self.kept[0]
        if taken:
            sequence = found
        else:
            layers = [KVLayer(self._context) for _ in range(self._layers)]
            sequence = Sequence(layers, torch.empty(room, dtype=torch.int64))
            if found is not None:
                for layer, other in zip(layers, found.layers, strict=True):
                    layer.copy(other, common)
                sequence.hold(prompt[:common], 0)
        sequence.keep(common, room)
        self.running.append(sequence)
        return sequence

    def _find(self, prompt: torch.Tensor) -> tuple[Any, int]:
        """The sequence that has most of `prompt`, and how many tokens."""
        if not self._reuse:
            return None, 0
        found = [(sequence.common(prompt), sequence) for sequence in (*self.kept, *self.running)]
        common, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return (best, common) if common else (None, 0)

    def end(self, sequence: Sequence) -> None:
        """The request is over: what the sequence holds is kept, until the room is wanted."""
        self.running.remove(sequence)
        if self._reuse and sequence.count:
            sequence.keep(sequence.count, kv_room(sequence.count))
            self.kept.append(sequence)
            del self.kept[:-KEPT_MAX]


def _rooms(sequences: Many[Sequence]) -> int:
    return sum(sequence.room for sequence in sequences)


def shared(sequences: Many[Sequence], counts: Many[int]) -> Cache:
    """The KV cache of a step with so many new tokens of each sequence."""
    if len(sequences) == 1:
        return sequences[0].cache
    each = zip(*(sequence.layers for sequence in sequences), strict=True)
    return Cache(layers=[SharedLayer(layers, counts) for layers in each])
