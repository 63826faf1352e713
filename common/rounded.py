"""Rows and tokens as whole numbers of 16 bits, for blocks that no matrix unit multiplies.

A row of floats or int4, or a token, is rounded to LARGEST steps of its largest number at most: what
is lost is 1/32,766 of that; float16 itself rounds each number by up to 1/2,048 of its own size. An
int8 row is what it is. Processors multiply pairs of 16-bit numbers and add neighbours in one
instruction; STEPS of these sums stay within 32 bits, and become float32 then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from common.integer_dot import PAIRS, pairs, round_at, scale_at
from common.kernels import compiled
from common.packed import widen_range_at
from common.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    ROWS,
    VECTORS,
    Several,
    every,
    item_at,
    load,
    number,
    of,
    store,
    total,
)

LARGEST = 16_383
STEPS = 4  # sums of pairs that are added up as integers
assert STEPS * 2 * LARGEST**2 < 2**31
LANES = 16  # of sums: 512 bits; where registers are shorter, LLVM takes two for one
CHUNK = STEPS * 2 * LANES  # numbers: what is rounded is whole chunks, with zeros behind it
SOME = PAIRS  # int8 numbers at a time: their rows are multiples of it
TOKENS = 16  # that meet all rows before the next do: they stay in a core's second cache
assert TOKENS % VECTORS == 0


def _wide(_: Any, items: Any, begin: Any, out: Any, at: Any) -> Any:
    """Fills int16 `out`, from `at` on, with SOME int8 numbers that begin at `begin`. LLVM leaves a
    loop that says so one number at a time."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = item_at(context, builder, signature.args[0], given[0], given[1])
        to = item_at(context, builder, signature.args[2], given[2], given[3])
        store(builder, to, builder.sext(load(builder, place, I8, SOME), of(I16, SOME)))
        return context.get_dummy_value()

    return types.void(items, types.int64, out, types.int64), make


_widen_some: Any = intrinsic(_wide)


def whole_chunks(width: int) -> int:
    """Numbers of a row of `width` numbers, or of a token, when it is rounded."""
    return -(-width // CHUNK) * CHUNK


@compiled
def _round(items: Any, starts: Any, width: int, out: Any, scales: Any) -> None:
    wide = np.empty((1, width), np.float32)  # of one row: it stays in a core's nearest cache
    for i in range(starts.shape[0]):
        widen_range_at(items, starts[i : i + 1], width, 0, wide)
        scales[i] = round_at(wide[0], LARGEST, out[i, :width])
        out[i, width:] = 0


@compiled
def _widen8(items: Any, starts: Any, width: int, out: Any, scales: Any) -> None:
    for i in range(starts.shape[0]):
        scales[i] = scale_at(items, starts[i])
        for k in range(0, width, SOME):
            _widen_some(items, starts[i] + k, out[i], k)
        out[i, width:] = 0


def round_rows(items: Any, starts: Any, width: int, out: Any, scales: Any) -> None:
    """The rows, or tokens, of `width` floats, int8 or int4 that begin at `starts`, rounded: fills
    `out` int16 [rows, whole chunks] and the scales, float32 [rows]: NaN where one has a NaN, or an
    inf."""
    (_widen8 if items.dtype == np.int8 else _round)(items, starts, width, out, scales)


def _sums(rows: int, count: int) -> Any:
    def make_for(_: Any, items: Any, starts: Any, i: Any, xs: Any, v: Any, made: Any) -> Any:
        """Of rounded rows the `rows` from starts[i] on, without their scales, times `count` of
        `xs`, rounded, from token `v` on, added to `made` float32 [rows × tokens]."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            several = Several(context, builder, signature, given, rows, count)
            sums = several.sums(every(FLOAT, LANES, 0.0))
            with several.steps(several.width, CHUNK) as at:
                places = [builder.add(at, number(k)) for k in range(0, CHUNK, 2 * LANES)]

                def numbers(row: Any) -> list[Any]:
                    return [load(builder, builder.gep(row, [k]), I16, 2 * LANES) for k in places]

                vectors = [numbers(vector) for vector in several.vectors]
                for row, those in zip(several.rows, sums, strict=True):
                    ours = numbers(row)
                    for vector, to in zip(vectors, those, strict=True):
                        added = every(I32, LANES, 0)
                        for one, other in zip(ours, vector, strict=True):
                            added = builder.add(added, pairs(builder, one, other))
                        value = builder.sitofp(added, of(FLOAT, LANES))
                        builder.store(builder.fadd(builder.load(to), value), to)
            several.add(lambda r, v: total(builder, builder.load(sums[r][v])))
            return context.get_dummy_value()

        return types.void(items, starts, types.int64, xs, types.int64, made), make

    return make_for


_few_by_few: Any = intrinsic(_sums(ROWS, VECTORS))


@compiled
def dot_rounded(
    items: Any, starts: Any, row_scales: Any, tokens: Any, scales: Any, out: Any
) -> None:
    """Fills `out` float32 [tokens, rows] with the products of rounded rows, which begin at `starts`
    of int16 `items`, and rounded `tokens`, of which there are a multiple of VECTORS. To the same
    bits whatever rows and tokens are beside."""
    count, made = starts.shape[0], np.empty(ROWS * VECTORS, np.float32)
    for first in range(0, tokens.shape[0], TOKENS):
        last = min(first + TOKENS, tokens.shape[0])
        for i in range(0, count, ROWS):
            for t in range(first, last, VECTORS):
                made[:] = 0
                _few_by_few(items, starts, i, tokens, t, made)
                for r in range(i, min(i + ROWS, count)):
                    for n in range(VECTORS):
                        value = made[(r - i) * VECTORS + n]
                        out[t + n, r] = value * (scales[t + n] * row_scales[r])
