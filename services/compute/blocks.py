"""A block of tokens, as products take it, and the way in which this machine multiplies fastest.

Two ways to multiply rows with a block: in float32, by torch; or in integers, by us. Some processors
make eight times as many products of 8 bits in a second as of float32, others fewer: so it is
measured, when a server begins.

Integers are multiplied by the processor's matrix unit, where it has one that we know and rows are
whole steps of it (common/amx.py, tiles.py), from numbers in halves of 8 bits; else as numbers of 16
(common/rounded.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from common import amx, tiles
from common.halves import PRODUCTS
from common.kernels import BITS, row_starts
from common.packed import Bits, Floats, Starts
from common.rounded import dot_rounded, round_rows, whole_chunks
from common.segment import large_pages
from common.store.geometry import row_bytes
from common.vectors import VECTORS
from services.compute.turns import median_us

Share = Callable[[int, int, Callable[[int, int], None]], None]
"""Does work for all of a number of items, some at a time: see Products.share."""
Room = Callable[[str, tuple[int, int], torch.dtype], torch.Tensor]
"""A thread's own memory by name, shape and dtype, whatever is in it, until it asks again."""

LAID_OUT = 512  # numbers of a token that a thread lays out at a time
ROUNDED = 64  # tokens that a thread rounds at a time: as float32 they stay in a core's cache
PROBE_ROWS, PROBE_TOKENS, PROBE_WIDTH, PROBE_TURNS = 256, 256, 2048, 5


def alone(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """A Share: all at once, by this thread."""
    work(0, count)


class Rounded(NamedTuple):
    """Tokens as rounded.py takes them, int16 [tokens, whole chunks], and their scales, float32
    [tokens], with some of zeros behind."""

    numbers: Bits
    scales: Floats


class Tiled(NamedTuple):
    """Tokens as a right side of tiles.py, and their scales, with room for whole tiles."""

    right: Bits
    scales: Floats


class TiledRoom:
    """Memory for one block laid out as tiles: to allocate it anew for each takes as long as to fill
    it. It has the block that came last; who finds another's there lays out again."""

    def __init__(self) -> None:
        self.owner: object = None
        self._memory = np.empty(0, np.int8)

    def take(self, owner: object, size: int) -> Bits:
        self.owner = owner
        if len(self._memory) < size:
            self._memory = large_pages(size).view(np.int8)
        return self._memory[:size]


class Tokens:
    """The tokens of a block, `rows` float [tokens, width], laid out in each way when it is first
    asked for; not by a thread that has a share in a product."""

    def __init__(self, rows: torch.Tensor, share: Share, room: TiledRoom):
        self._rows, self._share, self._room = rows, share, room
        self._key = object()  # not self: the room would keep the rows
        self._tiled = Tiled(np.empty(0, np.int8), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def columns(self) -> torch.Tensor:
        """float32 [width, tokens]"""
        out = torch.empty(self._rows.shape[1], len(self))

        def lay_out(first: int, end: int) -> None:
            out[first:end] = self._rows[:, first:end].T

        self._share(len(out), LAID_OUT, lay_out)
        return out

    @property
    def tiled(self) -> Tiled:
        """In integers, as tiles."""
        if self._room.owner is self._key:
            return self._tiled
        tokens, width = self._rows.shape
        right = self._room.take(self._key, tiles.side_size(tokens, amx.ROWS, width))
        pairs = -(-tokens // amx.ROWS)
        self._tiled = Tiled(right, np.zeros(pairs * amx.ROWS, np.float32))

        def lay_out(first: int, end: int) -> None:
            begin = first * amx.ROWS
            rows = self._rows[begin : end * amx.ROWS].float().contiguous().numpy()
            tiles.lay_tokens(rows, begin, right, self._tiled.scales)

        self._share(pairs, ROUNDED // amx.ROWS, lay_out)
        return self._tiled

    @cached_property
    def rounded(self) -> Rounded:
        """In integers of 16 bits."""
        tokens, width = self._rows.shape
        count = -(-tokens // VECTORS) * VECTORS
        numbers = np.empty((count, whole_chunks(width)), np.int16)
        made = Rounded(numbers, np.zeros(count, np.float32))
        numbers[tokens:] = 0

        def lay_out(first: int, end: int) -> None:
            rows = self._rows[first:end].float().contiguous().numpy().reshape(-1)
            starts = row_starts(end - first, width)
            round_rows(rows, starts, width, numbers[first:end], made.scales[first:end])

        self._share(tokens, ROUNDED, lay_out)
        return made

    def in_integers(self, items: Bits, room: Room) -> Callable[[Starts], torch.Tensor]:
        """What multiplies rows of `items` with them in integers: float32 [rows, tokens] in a
        thread's own memory, by `room`."""
        width, count = self._rows.shape[1], len(self)
        if amx.usable() and tiles.fits(width):
            tiled = self.tiled
            return lambda starts: multiply_tiled(items, starts, width, tiled, count, room)
        rounded = self.rounded
        return lambda starts: multiply_rounded(items, starts, width, rounded, count, room)


def multiply_tiled(
    items: Bits, starts: Starts, width: int, tiled: Tiled, tokens: int, room: Room
) -> torch.Tensor:
    """The product of each row with each token: float32 [rows, tokens], in the thread's own
    memory."""
    whole, count = items.dtype == np.int8, len(starts)
    each = amx.ROWS * (2 if whole else 1)
    size = tiles.side_size(min(count, tiles.PAIRS * each), each, width)
    made = room("made", (count, len(tiled.scales)), torch.float32)
    left = room("left", (1, size), torch.int8).view(-1).numpy()
    multiply = tiles.multiply_rows if whole else tiles.multiply_halves
    multiply(items, starts, width, *tiled, left, made.numpy())
    return made[:, :tokens]


def multiply_rounded(
    items: Bits, starts: Starts, width: int, rounded: Rounded, tokens: int, room: Room
) -> torch.Tensor:
    """The same by numbers of 16 bits."""
    numbers, scales = rounded
    count, size = len(starts), numbers.shape[1]
    rows = room("rounded", (count, size), torch.int16).numpy()
    row_scales = np.empty(count, np.float32)
    round_rows(items, starts, width, rows, row_scales)
    made = room("made", (len(scales), count), torch.float32)
    rows, begin = rows.reshape(-1), row_starts(count, size)
    dot_rounded(rows, begin, row_scales, numbers, scales, made.numpy())
    return made[:tokens].T


@dataclass(frozen=True)
class BlockProbe:
    """How long a block's products take one thread here, microseconds: in float32, and in integers
    by the number format of the rows."""

    float32_us: float
    float16_us: float
    int8_us: float
    int4_us: float

    @property
    def names(self) -> list[str]:
        """The number formats of rows that are best multiplied in integers."""
        return [name for name in PRODUCTS if getattr(self, f"{name}_us") < self.float32_us]

    @property
    def halved(self) -> list[np.dtype[Any]]:
        """Their dtypes."""
        return [np.dtype(BITS[name]) for name in self.names]


def probe_blocks() -> BlockProbe:
    """Times the ways by turns, medians. The kernels are compiled then, too."""
    tokens = Tokens(torch.ones(PROBE_TOKENS, PROBE_WIDTH), alone, TiledRoom())
    wide = torch.ones(PROBE_ROWS, PROBE_WIDTH)

    @cache
    def room(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def of(name: str) -> Callable[[], object]:
        row = np.dtype(BITS[name])
        width = row_bytes(name, PROBE_WIDTH) // row.itemsize
        # The last first: gathered, as most bundles are.
        items, starts = np.ones(PROBE_ROWS * width, row), row_starts(PROBE_ROWS, width)[::-1].copy()
        return lambda: tokens.in_integers(items, room)(starts)

    ways: Mapping[str, Callable[[], object]] = {
        "float32_us": lambda: torch.mm(wide, tokens.columns),
        "float16_us": of("float16"),
        "int8_us": of("int8"),
        "int4_us": of("int4"),
    }
    return BlockProbe(**median_us(ways, PROBE_TURNS))
