"""A block of tokens, as products take it, and the way in which this machine multiplies fastest.

Two ways to multiply rows with a block: in float32, by torch; or in integers, rows and tokens in
halves of 8 bits (common/halves.py). Some processors make eight times as many products of 8 bits in
a second as of float32, others fewer, or wrong ones: so it is measured, when a server begins.

Integers are multiplied by the processor's matrix unit, where it has one that we know and rows are
whole steps of it (common/amx.py, tiles.py); else by torch, which takes three products of halves for
rows of floats and int4, and two for int8 ones, whose numbers have one half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from common import amx, tiles
from common.halves import PRODUCTS, halve_rows, halve_tokens, join
from common.jobs import dot_job, listed, perform
from common.kernels import BITS, row_starts
from common.packed import Bits, Floats, Starts, Vectors, vectors_for
from common.segment import large_pages
from common.store.geometry import row_bytes
from services.compute.turns import median_us

Share = Callable[[int, int, Callable[[int, int], None]], None]
"""Does work for all of a number of items, some at a time: see Products.share."""
Room = Callable[[str, tuple[int, int], torch.dtype], torch.Tensor]
"""A thread's own memory by name, shape and dtype, whatever is in it, until it asks again."""

LAID_OUT = 512  # numbers of a token that a thread lays out at a time
HALVED_ROWS = 64  # or tokens in halves: as float32 they stay in a core's cache
PROBE_ROWS, PROBE_TOKENS, PROBE_WIDTH, PROBE_TURNS = 256, 256, 2048, 5


def alone(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """A Share: all at once, by this thread."""
    work(0, count)


class Halves(NamedTuple):
    """Tokens in integers: int8 [2 × tokens, width], the high halves first, and the scales, float32
    [tokens]."""

    numbers: torch.Tensor
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

    @cached_property
    def halves(self) -> Halves:
        """In integers."""
        tokens, width = self._rows.shape
        numbers = torch.empty(2 * tokens, width, dtype=torch.int8)
        made = Halves(numbers, np.empty(tokens, np.float32))

        def lay_out(first: int, end: int) -> None:
            rows = self._rows[first:end].float().contiguous().numpy()
            halve_tokens(rows, first, numbers.numpy(), made.scales)

        self._share(tokens, HALVED_ROWS, lay_out)
        return made

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

        self._share(pairs, HALVED_ROWS // amx.ROWS, lay_out)
        return self._tiled

    @cached_property
    def rounded(self) -> Vectors:
        """In integers of 16 bits, as a few tokens are for int8 rows."""
        return vectors_for(np.empty(0, np.int8), self._rows.float().contiguous().numpy())

    def in_integers(self, items: Bits, room: Room) -> Callable[[Starts], torch.Tensor]:
        """What multiplies rows of `items` with them in integers: float32 [rows, tokens] in a
        thread's own memory, by `room`."""
        width, count = self._rows.shape[1], len(self)
        if amx.usable() and tiles.fits(width):
            tiled = self.tiled
            return lambda starts: multiply_tiled(items, starts, width, tiled, count, room)
        if items.dtype == np.int8:
            rounded = self.rounded
            return lambda starts: multiply_rounded(items, starts, rounded, count, room)
        halves = self.halves
        return lambda starts: multiply_halves(items, starts, halves, room)


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
    items: Bits, starts: Starts, vectors: Vectors, tokens: int, room: Room
) -> torch.Tensor:
    """The same of int8 rows by the kernel that a few tokens take: torch's product of integers
    takes 1.1 to 1.8 times as long (docs/measurements.md)."""
    made = room("made", (len(vectors[0]), len(starts)), torch.float32)
    job = dot_job(items, starts, vectors, len(starts), made.numpy())
    perform(listed([job])[1:])
    return made[:tokens].T


def multiply_halves(items: Bits, starts: Starts, halves: Halves, room: Room) -> torch.Tensor:
    """The same of rows of floats or int4 by torch's products."""
    numbers, scales = halves
    count, tokens, width = len(starts), len(scales), numbers.shape[1]
    high, low = (room(name, (count, width), torch.int8) for name in ("high", "low"))
    row_scales = np.empty(count, np.float32)
    halve_rows(items, starts, high.numpy(), low.numpy(), row_scales)
    both = room("both", (count, 2 * tokens), torch.int32)
    of_low = room("of_low", (count, tokens), torch.int32)
    torch._int_mm(low, numbers[:tokens].T, out=of_low)
    torch._int_mm(high, numbers.T, out=both)
    made = room("made", (count, tokens), torch.float32)
    join(both.numpy(), of_low.numpy(), row_scales, scales, made.numpy())
    return made


@dataclass(frozen=True)
class BlockProbe:
    """How long a block's products take one thread here, microseconds: in float32, and in integers
    by the number format of the rows; and whether torch's integers come out right."""

    float32_us: float
    float16_us: float
    int8_us: float
    int4_us: float
    right: bool

    @property
    def names(self) -> list[str]:
        """The number formats of rows that are best multiplied in integers; int8 ones never by
        torch."""
        right = [name for name in PRODUCTS if self.right or name == "int8"]
        return [name for name in right if getattr(self, f"{name}_us") < self.float32_us]

    @property
    def halved(self) -> list[np.dtype[Any]]:
        """Their dtypes."""
        return [np.dtype(BITS[name]) for name in self.names]


def probe_blocks() -> BlockProbe:
    """Times the ways by turns, medians, and tries integers at their largest: some processors add
    two products up in 16 bits and lose what is above. The kernels are compiled then, too."""
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
    high = torch.full((PROBE_ROWS, PROBE_WIDTH), 127, dtype=torch.int8)
    least = torch.full((PROBE_TOKENS, PROBE_WIDTH), -128, dtype=torch.int8)
    right = bool((torch._int_mm(high, least.T) == 127 * -128 * PROBE_WIDTH).all())
    return BlockProbe(**median_us(ways, PROBE_TURNS), right=right)
