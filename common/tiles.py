"""Products of 8-bit numbers by a processor's matrix unit (common/amx.py).

Sides are laid out so that their tiles are read one after another:

    left    [pairs, steps, 2, 16 rows, 64]          a step is 64 numbers of each row
    right   [pairs, steps, 2, 16, 16 columns, 4]    and of each column

A pair of each side makes four tiles of sums. The two of a pair are other rows, or columns, or the
halves of the same (common/halves.py).

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
    add_joined,
    ask,
    begin_tiles,
    copy,
    end_tiles,
    interleave,
    join,
    join_halved,
    multiply_four,
)
from common.halves import LARGEST, halve_at
from common.integer_dot import scale_at
from common.kernels import compiled
from common.packed import widen_range_at

PAIRS = 8  # of rows, that meet all tokens before the next do: they stay in a core's second cache


def fits(width: int) -> bool:
    """Whether rows of `width` numbers are whole steps."""
    return width % STEP == 0


def side_size(count: int, each: int, width: int) -> int:
    """Numbers of a side of `count` rows, or columns, of `width` numbers, `each` in a pair."""
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
def lay_weights(
    weights: Any, row_scales: Any, first: int, end: int, left: Any, scales: Any
) -> None:
    """The pairs from `first` to `end` of a left side: in a pair 16 tokens, the high halves and the
    low ones of `weights` float32 [rows, tokens], each times its row's scale; and the tokens'
    scales, float32 [tokens]."""
    rows, begin, last = weights.shape[0], first * ROWS, min(end * ROWS, weights.shape[1])
    count, size = last - begin, _pair_size(rows)
    largest, nothing = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for i in range(rows):
        row, scale = weights[i, begin:last], row_scales[i]
        for t in range(count):
            size_of = abs(row[t]) * scale
            largest[t] = size_of if size_of > largest[t] else largest[t]
            nothing[t] += row[t] * 0  # or no number, which has to come through
    inverse, of_tokens = np.zeros(count, np.float32), scales[begin:last]
    for t in range(count):
        if largest[t] > 0 and nothing[t] == 0:
            inverse[t] = np.float32(LARGEST) / largest[t]
        of_tokens[t] = largest[t] / np.float32(LARGEST) + nothing[t]
    high, low, words = np.empty(count, np.int32), np.empty(count, np.int32), left.view(np.int32)
    for k in range(0, size // (2 * ROWS), 4):
        high[:] = 0
        low[:] = 0
        for j in range(min(4, rows - k)):
            row, scale = weights[k + j, begin:last], row_scales[k + j]
            shift, byte, half, half_one = (
                np.int32(8 * j),
                np.int32(255),
                np.int32(128),
                np.float32(0.5),
            )
            for t in range(count):
                exact = row[t] * (scale * inverse[t])
                value = np.int32(exact + (half_one if exact >= 0 else -half_one))
                high[t] |= (((value + half) >> np.int32(8)) & byte) << shift
                low[t] |= (value & byte) << shift
        for t in range(0, count, ROWS):
            at = ((begin + t) // ROWS * size + k // STEP * 2 * TILE + k % STEP) // 4
            of_high, of_low = words[at:], words[at + TILE // 4 :]
            for b in range(min(ROWS, count - t)):
                of_high[b * STEP // 4] = high[t + b]
                of_low[b * STEP // 4] = low[t + b]


@compiled
def lay_columns(items: Any, starts: Any, width: int, first: int, end: int, right: Any) -> None:
    """The steps from `first` to `end` of a right side: int8 rows of `width` numbers, 64 of them in
    a step; in a pair 32 columns."""
    rows, size = starts.shape[0], _pair_size(starts.shape[0])
    for k in range(first * STEP, min(end * STEP, rows), 4):
        # After the last row comes the last again: what a side has beyond its rows is multiplied
        # with zeros of the other.
        last = rows - 1
        one, two = starts[k], starts[min(k + 1, last)]
        three, four = starts[min(k + 2, last)], starts[min(k + 3, last)]
        place = k // STEP * 2 * TILE + k % STEP * ROWS
        for c in range(0, width, ROWS):
            if c % STEP == 0:
                for after in range(4, 8):
                    ask(items, starts[min(k + after, last)] + c)
            to = place + c // (2 * ROWS) * size + c // ROWS % 2 * TILE
            interleave(items, one + c, two + c, three + c, four + c, right, to)


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
            steps = width // STEP
            multiply_four(left, i // each * size, right, t // ROWS * size, steps, sums)
            for a in range(min(each, rows - i)):
                place, at = (a // ROWS * 2 * ROWS + a % ROWS) * ROWS, (i + a) * tokens + t
                if halved:
                    join_halved(sums, place, row_scales[i + a], scales, t, flat, at)
                else:
                    join(sums, place, row_scales[i + a], scales, t, flat, at)
    end_tiles()


@compiled
def add(left: Any, right: Any, rows: int, first: int, end: int, scales: Any, out: Any) -> None:
    """Adds to `out` float32 [tokens, width], contiguous, the products of weights by `lay_weights`
    with `rows` rows by `lay_columns`, in the columns from `first` to `end`, whole pairs."""
    tokens, width = out.shape
    size, ones = _pair_size(rows), np.ones(ROWS, np.float32)
    sums, flat = np.empty(4 * ROWS * ROWS, np.int32), out.reshape(out.size)
    begin_tiles()
    for t in range(0, tokens, ROWS):
        for c in range(first, end, 2 * ROWS):
            right_at = c // (2 * ROWS) * size
            multiply_four(left, t // ROWS * size, right, right_at, size // (2 * TILE), sums)
            for a in range(min(ROWS, tokens - t)):
                for two in range(2):
                    place, at = (two * ROWS + a) * ROWS, (t + a) * width + c + two * ROWS
                    add_joined(sums, place, scales[t + a], ones, 0, flat, at)
    end_tiles()


def compile_sums() -> None:
    """Compiles what sums of int8 rows take, so that no token waits for it."""
    side, starts = np.zeros(2 * TILE, np.int8), np.zeros(1, np.int64)
    weights, out = np.zeros((1, 1), np.float32), np.zeros((1, 2 * ROWS), np.float32)
    scales = np.zeros(1, np.float32)
    lay_weights(weights, scales, 0, 1, side, scales)
    lay_columns(side, starts, 2 * ROWS, 0, 1, side)
    add(side, side, 1, 0, 2 * ROWS, scales, out)


@compiled
def _pair_size(width: int) -> int:
    """Numbers of a pair of a side."""
    return -(-width // STEP) * 2 * TILE
