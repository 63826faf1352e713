"""Sums of rows for the tokens of a block that fire them, where those are few.

Tile by tile: of a tile's rows those that any token fires are made float32, a piece of their width,
in memory that stays in a core's cache; then each token adds its own. So each row comes from memory
once, and one that nobody fires not at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.float_rows import add_at
from common.kernels import compiled
from common.packed import Bits, Floats, Starts, scales_of, widen_range_at
from common.store.geometry import GROUP

TILE_ROWS = 256  # half a megabyte of a piece of 512 numbers: beside the sums in a core's cache
LANES = 16  # weights that are looked at at once

_I16, _I64, _FLOAT = ir.IntType(16), ir.IntType(64), ir.FloatType()


class Fired(NamedTuple):
    """The rows that tokens fire, in tiles, and for each tile and token which of them, in order."""

    starts: Starts  # of the rows that any token fires
    ends: npt.NDArray[np.int64]  # [tiles]: how many of them there are up to each tile's last
    begins: npt.NDArray[np.int64]  # [tiles, tokens + 1]: where a token's part of what follows is
    places: npt.NDArray[np.int64]  # a row's number in its tile × the numbers of a piece
    weights: Floats


def list_fired(items: Bits, starts: Starts, weights: Floats, step: int, most: int) -> Fired | None:
    """Lists `weights` float32 [rows, tokens], contiguous, that are not 0, for rows that begin at
    `starts` of `items` and are added in pieces of `step` numbers. None: they are more than
    `most`."""
    rows, tokens = weights.shape
    tiles = -(-rows // TILE_ROWS)
    begins = np.empty((tiles, tokens + 1), np.int64)
    count = _count_at(weights, begins)
    if count > most:
        return None
    scales = scales_of(items, starts) if items.dtype == np.int8 else np.ones(rows, np.float32)
    fired = Fired(
        np.empty(rows, np.int64),
        np.empty(tiles, np.int64),
        begins,
        np.empty(count, np.int64),
        np.empty(count, np.float32),
    )
    _list_at(weights, starts, scales, step, *fired)
    return fired


def add_fired(items: Bits, fired: Fired, width: int, first: int, room: Floats, out: Floats) -> None:
    """For each token, out += Σ its weights × its rows, of which `out` float32 [tokens, step] has
    the numbers from `first` on: rows of `width` numbers, of int4 ones `first` and `step` are
    multiples of GROUP. `room` float32 [TILE_ROWS, step] is overwritten."""
    _add_at(items, *fired, width, first, room, out)


def compile_fired(items: Bits) -> None:
    """Compiles what these take for rows of such items, so that no token waits for it."""
    starts, wide = np.zeros(1, np.int64), np.zeros((1, GROUP), np.float32)
    fired = list_fired(items, starts, wide[:, :1], GROUP, 1)
    assert fired is not None
    add_fired(items, fired, GROUP, 0, wide, wide.copy())


def _bits(_: Any, flat: Any, first: Any) -> Any:
    """Of LANES floats of `flat` from `first` on a bit for each that is not 0, the lowest first."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        kind = ir.VectorType(_FLOAT, LANES)
        at = builder.bitcast(builder.gep(array.data, [given[1]]), kind.as_pointer())
        loaded = builder.load(at)
        loaded.align = 4
        # "une": NaN is not 0
        found = builder.fcmp_unordered("!=", loaded, ir.Constant(kind, [0.0] * LANES))
        return builder.zext(builder.bitcast(found, _I16), _I64)

    return types.int64(flat, types.int64), make


def _lowest(_: Any, bits: Any) -> Any:
    """The place of the lowest bit of an integer that is not 0."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), make


_sixteen: Any = intrinsic(_bits)
_lowest_of: Any = intrinsic(_lowest)


@compiled
def _bits_at(flat: Any, first: int, count: int) -> Any:
    if count >= LANES:
        return _sixteen(flat, first)
    bits = 0
    for j in range(count):
        if flat[first + j] != 0:
            bits |= 1 << j
    return bits


@compiled
def _count_at(weights: Any, begins: Any) -> int:
    """Fills `begins` and returns how many weights are not 0."""
    rows, tokens = weights.shape
    flat, total = weights.reshape(weights.size), 0
    for tile in range(begins.shape[0]):
        counts = begins[tile]
        counts[:] = 0
        for i in range(tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, rows)):
            for b in range(0, tokens, LANES):
                bits = _bits_at(flat, i * tokens + b, tokens - b)
                while bits:
                    counts[b + _lowest_of(bits) + 1] += 1
                    bits &= bits - 1
        for b in range(tokens + 1):
            total += counts[b]
            counts[b] = total
    return total


@compiled
def _list_at(
    weights: Any,
    starts: Any,
    scales: Any,
    step: int,
    fired: Any,
    ends: Any,
    begins: Any,
    places: Any,
    values: Any,
) -> None:
    """Fills the others, by `begins`; a value is a weight × its row's scale."""
    rows, tokens = weights.shape
    flat, found = weights.reshape(weights.size), 0
    for tile in range(begins.shape[0]):
        next_of, before = begins[tile].copy(), found
        for i in range(tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, rows)):
            any_of_them = 0
            for b in range(0, tokens, LANES):
                bits = _bits_at(flat, i * tokens + b, tokens - b)
                any_of_them |= bits
                while bits:
                    token = b + _lowest_of(bits)
                    at = next_of[token]
                    places[at] = (found - before) * step
                    values[at] = flat[i * tokens + token] * scales[i]
                    next_of[token] = at + 1
                    bits &= bits - 1
            if any_of_them:
                fired[found] = starts[i]
                found += 1
        ends[tile] = found


@compiled
def _add_at(
    items: Any,
    fired: Any,
    ends: Any,
    begins: Any,
    places: Any,
    values: Any,
    width: int,
    first: int,
    room: Any,
    out: Any,
) -> None:
    step, before = out.shape[1], 0
    flat = room.reshape(room.size)
    for tile in range(begins.shape[0]):
        rows = fired[before : ends[tile]]
        wide = flat[: len(rows) * step].reshape(len(rows), step)
        widen_range_at(items, rows, width, first, wide)
        before = ends[tile]
        for b in range(out.shape[0]):
            p, q = begins[tile, b], begins[tile, b + 1]
            if p < q:
                add_at(flat, places[p:q], values[p:q], out[b])
