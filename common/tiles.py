"""Products of 8-bit numbers by a processor's matrix unit (common/amx.py).

Sides are laid out so that their tiles are read one after another:

    left    [pairs, steps, 2, 16 rows, 64]          a step is 64 numbers of each row
    right   [pairs, steps, 2, 16, 16 columns, 4]    and of each column

A pair of each side makes four tiles of sums. The two of a left pair are other rows, or the halves
of the same (common/halves.py); of a right pair, halves of tokens.

torch's product of such numbers is made by the same instructions, and lays its right side out anew
each time (docs/measurements.md: what that takes).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.amx import (
    ROWS,
    STEP,
    TILE,
    ask,
    begin_tiles,
    copy,
    end_tiles,
    join,
    join_halved,
    multiply_four,
)
from common.halves import halve_at
from common.integer_dot import scale_at
from common.kernels import compiled
from common.packed import widen_range_at

PAIRS = 8  # of rows that meet all tokens before the next do: they stay in a core's second cache


def fits(width: int) -> bool:
    """Whether rows of `width` numbers are whole steps."""
    return width % STEP == 0


def side_size(count: int, each: int, width: int) -> int:
    """Numbers of a side of `count` rows, or tokens, of `width` numbers, `each` in a pair."""
    return -(-count // each) * _pair_size(width)


@compiled
def _lay_rows(items: Any, starts: Any, width: int, left: Any, scales: Any) -> None:
    """int8 rows of `width` numbers as a left side, 32 of them in a pair; and their scales, float32
    [rows]."""
    for i in range(starts.shape[0]):
        at = i // (2 * ROWS) * _pair_size(width) + i // ROWS % 2 * TILE + i % ROWS * STEP
        coming = starts[min(i + 1, starts.shape[0] - 1)]
        for k in range(0, width, STEP):
            ask(items, coming + k)
            copy(items, starts[i] + k, left, at + k * 2 * ROWS)
        scales[i] = scale_at(items, starts[i])


@compiled
def _lay_halves(items: Any, starts: Any, width: int, left: Any, scales: Any) -> None:
    """Rows of floats or int4 as a left side: in a pair 16, their high halves and their low ones;
    and the scales, float32 [rows]."""
    wide, halves = np.empty((1, width), np.float32), np.empty(2 * width, np.int8)
    for i in range(starts.shape[0]):
        widen_range_at(items, starts[i : i + 1], width, 0, wide)
        scales[i] = halve_at(wide[0], halves[:width], halves[width:])
        at = i // ROWS * _pair_size(width) + i % ROWS * STEP
        for k in range(0, width, STEP):
            copy(halves, k, left, at + k * 2 * ROWS)
            copy(halves, width + k, left, at + k * 2 * ROWS + TILE)


@compiled
def lay_tokens(rows: Any, first: int, right: Any, scales: Any) -> None:
    """Some tokens, `rows` float32 [some, width], as pairs of a right side from token `first` on, a
    multiple of 16: in a pair 16 tokens, their high halves and their low ones; and their scales."""
    some, width = rows.shape
    halves, to = np.empty(2 * width, np.int8), right.view(np.int32)
    words = halves.view(np.int32)
    for i in range(some):
        t = first + i
        scales[t] = halve_at(rows[i], halves[:width], halves[width:])
        for half in range(2):
            at = (t // ROWS * _pair_size(width) + half * TILE) // 4 + t % ROWS
            row = words[half * width // 4 :]
            for k in range(0, width // 4, ROWS):
                step = to[at + k * 2 * ROWS :]
                for j in range(ROWS):
                    step[j * ROWS] = row[k + j]


@compiled
def multiply_rows(
    items: Any, starts: Any, width: int, right: Any, scales: Any, left: Any, out: Any
) -> None:
    """Fills `out` with the products of int8 rows of `width` numbers and of tokens by `lay_tokens`:
    float32 [rows, tokens], contiguous. `scales` and `out` have room for whole tiles of tokens,
    `left` for PAIRS pairs or all: what is in it is overwritten."""
    row_scales = np.empty(PAIRS * 2 * ROWS, np.float32)
    for first in range(0, starts.shape[0], len(row_scales)):
        own = starts[first : first + len(row_scales)]
        _lay_rows(items, own, width, left, row_scales)
        of_them = out[first : first + len(own)]
        _multiply_sides(left, right, width, False, row_scales, scales, of_them)


@compiled
def multiply_halves(
    items: Any, starts: Any, width: int, right: Any, scales: Any, left: Any, out: Any
) -> None:
    """The same of rows of floats or int4."""
    row_scales = np.empty(PAIRS * ROWS, np.float32)
    for first in range(0, starts.shape[0], len(row_scales)):
        own = starts[first : first + len(row_scales)]
        _lay_halves(items, own, width, left, row_scales)
        of_them = out[first : first + len(own)]
        _multiply_sides(left, right, width, True, row_scales, scales, of_them)


@compiled
def _multiply_sides(
    left: Any, right: Any, width: int, halved: bool, row_scales: Any, scales: Any, out: Any
) -> None:
    """Of a left side by `_lay_halves` if it is `halved`, else by `_lay_rows`."""
    rows, tokens = out.shape
    size, each = _pair_size(width), ROWS if halved else 2 * ROWS
    sums, flat = np.empty(4 * ROWS * ROWS, np.int32), out.reshape(out.size)
    begin_tiles()
    for t in range(0, tokens, ROWS):
        for i in range(0, rows, each):
            multiply_four(left, i // each * size, right, t // ROWS * size, width // STEP, sums)
            for a in range(min(each, rows - i)):
                place, at = (a // ROWS * 2 * ROWS + a % ROWS) * ROWS, (i + a) * tokens + t
                if halved:
                    join_halved(sums, place, row_scales[i + a], scales, t, flat, at)
                else:
                    join(sums, place, row_scales[i + a], scales, t, flat, at)
    end_tiles()


@compiled
def _pair_size(width: int) -> int:
    """Numbers of a pair of a side, of whole steps."""
    return width // STEP * 2 * TILE
