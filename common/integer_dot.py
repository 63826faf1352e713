"""Products of packed rows with a vector, in integers.

The vector is rounded to int16, by its largest value, and a product of two integers is an integer:
processors multiply 8 or 16 pairs and add neighbours in one instruction. In float32 each number of a
row is converted first: where that is slower than memory is, int8 rows take as long as float16 ones,
and int4 rows longer (docs/measurements.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.kernels import compiled, in_order, one_after_another, real
from common.store.geometry import GROUP, SCALED
from common.vectors import (
    FLOAT,
    HALF,
    I8,
    I16,
    I32,
    LANES,
    LINE_BYTES,
    NEAR,
    ROOMY,
    ROWS,
    SECOND,
    VECTORS,
    Several,
    every,
    item_at,
    load,
    number,
    of,
    pick,
    rows_at,
    total,
    width_of,
)

LARGEST = 32767  # of the rounded vector
SIZE = np.uint32(0x7FFFFFFF)  # of a float32's bits, all but its sign
INFINITE = np.uint32(0x7F800000)
LARGEST_FLOAT = np.finfo(np.float32).max
PAIRS = 2 * LANES  # numbers that one instruction multiplies, adding neighbours
CHUNK = 4096  # numbers of an int8 row whose products add up within int32: 512 × 128 × 32767 a lane
WORD = 4  # numbers of an int4 row in 16 bits
WORDS = GROUP // WORD
# Rows that are multiplied at a time: with VECTORS vectors; and with one, of int8 rows that lie one
# after another.
ROWS_BY_FOUR, ROWS_BEHIND = (2, 1) if ROOMY else (ROWS, 2)


def pairs(builder: Any, numbers: Any, by: Any) -> Any:
    """int32 [n ÷ 2] of two vectors of integers [n]: their products, neighbours added. Written so
    that LLVM knows it for the one instruction that it is on x86."""
    count = numbers.type.count
    wide = of(I32, count)
    products = builder.mul(builder.sext(numbers, wide), builder.sext(by, wide))
    even, odd = (pick(builder, products, range(first, count, 2)) for first in (0, 1))
    return builder.add(even, odd)


def _sums8(rows: int, count: int, cache: int) -> Any:
    def make_for(_: Any, items: Any, starts: Any, i: Any, xs: Any, v: Any, made: Any) -> Any:
        """Of the int8 rows the `rows` from starts[i] on, without their scales, times `count` of
        `xs`, int16, from vector `v` on, added to `made` float32 [rows × vectors]. The width is
        a multiple of PAIRS."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            several = Several(context, builder, signature, given, rows, count)
            sums = several.sums(every(I32, LANES, 0))

            def add(at: Any) -> None:
                numbers = [load(builder, builder.gep(row, [at]), I8, PAIRS) for row in several.rows]
                for n, vector in enumerate(several.vectors):
                    by = load(builder, builder.gep(vector, [at]), I16, PAIRS)
                    for some, those in zip(numbers, sums, strict=True):
                        added = builder.add(builder.load(those[n]), pairs(builder, some, by))
                        builder.store(added, those[n])

            def value(row: int, vector: int) -> Any:
                made = builder.load(sums[row][vector])
                builder.store(every(I32, LANES, 0), sums[row][vector])
                return total(builder, builder.sitofp(made, of(FLOAT, LANES)))

            with several.steps(several.width, CHUNK) as first:
                end = several.least(builder.add(first, number(CHUNK)), several.width)
                lines = builder.and_(end, number(-LINE_BYTES))
                with several.steps(lines, LINE_BYTES, first) as line:
                    several.ask(line, cache)
                    for after in range(0, LINE_BYTES, PAIRS):
                        add(builder.add(line, number(after)))
                with several.steps(end, PAIRS, lines) as at:
                    add(at)
                several.add(value)
            return context.get_dummy_value()

        return types.void(items, starts, types.int64, xs, types.int64, made), make

    return make_for


def _sums4(rows: int, count: int, cache: int) -> Any:
    def make_for(
        _: Any, items: Any, starts: Any, i: Any, xs: Any, v: Any, made: Any, of_groups: Any
    ) -> Any:
        """The numbers of the int4 rows, `rows` from starts[i] on, each times its group's scale,
        times `count` of `xs`, int16 by words (`_by_words`), from vector `v` on, and each group's
        minimum times its sum of x, `of_groups` float32 [vectors, groups]; added to `made` float32
        [rows × vectors].

        Two groups' numbers lie in PAIRS words. A shift and a mask make int16 of them that are
        multiplied as they are; a group's products are the half of the lanes that takes its
        scale."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            several = Several(context, builder, signature, given, rows, count)
            sums = several.sums(every(FLOAT, LANES, 0.0))
            groups = width_of(context, builder, of_groups, given[6])
            of_x = rows_at(context, builder, of_groups, given[6], given[4], count)
            _add_groups(builder, several, sums, groups, cache)
            _add_minima(builder, several, sums, groups, of_x)
            several.add(lambda r, v: total(builder, builder.load(sums[r][v])))
            return context.get_dummy_value()

        given = (items, starts, types.int64, xs, types.int64, made, of_groups)
        return types.void(*given), make

    return make_for


def _add_groups(
    builder: Any, several: Several, all_sums: list[list[Any]], groups: Any, cache: int
) -> None:
    """To the sums those of all groups' numbers: two groups at a time, and one that is left."""
    ends = builder.mul(groups, number(GROUP // 2))
    scales = [builder.bitcast(builder.gep(row, [ends]), HALF.as_pointer()) for row in several.rows]

    def add(group: Any, count: int) -> None:
        lanes = LANES // 2 * count
        at = builder.mul(group, number(GROUP // 2))
        several.ask(builder.mul(group, number(GROUP // 2 + 4)), cache)
        for row, scale, sums in zip(several.rows, scales, all_sums, strict=True):
            words = load(builder, builder.gep(row, [at]), I16, 2 * lanes)
            shifted = [builder.lshr(words, every(I16, 2 * lanes, 4 * j)) for j in range(WORD)]
            numbers = [builder.and_(each, every(I16, 2 * lanes, 15)) for each in shifted]
            halves = load(builder, builder.gep(scale, [group]), HALF, count)
            each = builder.fpext(halves, of(FLOAT, count))
            each = pick(builder, each, [lane // 4 for lane in range(lanes)])
            for vector, those in zip(several.vectors, sums, strict=True):
                by = builder.gep(vector, [builder.mul(group, number(GROUP))])
                products = every(I32, lanes, 0)
                for j, some in enumerate(numbers):
                    part = load(builder, builder.gep(by, [number(j * 2 * lanes)]), I16, 2 * lanes)
                    products = builder.add(products, pairs(builder, some, part))
                scaled = builder.fmul(builder.sitofp(products, of(FLOAT, lanes)), each)
                _add_lanes(builder, those, scaled)

    odd = builder.and_(groups, number(1))
    even = builder.sub(groups, odd)
    with several.steps(even, 2) as group:
        add(group, 2)
    with builder.if_then(builder.trunc(odd, ir.IntType(1))):
        add(even, 1)


def _add_minima(
    builder: Any, several: Several, all_sums: list[list[Any]], groups: Any, of_x: list[Any]
) -> None:
    """To the sums those of all groups' minima, each times the sum of x there, `of_x` for each
    vector: LANES groups at a time, and what is left one by one."""
    begin = builder.mul(groups, number(GROUP // 2 + 2))
    minima = [builder.bitcast(builder.gep(row, [begin]), HALF.as_pointer()) for row in several.rows]

    def add(group: Any, lanes: int) -> None:
        parts = [load(builder, builder.gep(each, [group]), FLOAT, lanes) for each in of_x]
        for least, sums in zip(minima, all_sums, strict=True):
            halves = load(builder, builder.gep(least, [group]), HALF, lanes)
            wide = builder.fpext(halves, of(FLOAT, lanes))
            for part, those in zip(parts, sums, strict=True):
                _add_lanes(builder, those, builder.fmul(wide, part))

    whole = builder.and_(groups, number(-LANES))
    with several.steps(whole, LANES) as group:
        add(group, LANES)
    with several.steps(groups, 1, whole) as group:
        add(group, 1)


def _add_lanes(builder: Any, to: Any, lanes: Any) -> None:
    """Adds float32 to the first of a sum's LANES."""
    count = lanes.type.count
    if count < LANES:
        rest = every(FLOAT, count, 0.0)
        places = [min(lane, count) for lane in range(LANES)]  # the first of the rest, at last
        lanes = builder.shuffle_vector(lanes, rest, ir.Constant(of(I32, LANES), places))
    builder.store(builder.fadd(builder.load(to), lanes), to)


# How many rows, and how near the next ones: as was fastest (docs/measurements.md).
_one_behind8: Any = intrinsic(_sums8(ROWS_BEHIND, 1, SECOND))
_one8: Any = intrinsic(_sums8(ROWS, 1, SECOND))
_four8: Any = intrinsic(_sums8(ROWS_BY_FOUR, VECTORS, NEAR))
_one4: Any = intrinsic(_sums4(ROWS, 1, NEAR))
_four4: Any = intrinsic(_sums4(ROWS_BY_FOUR, VECTORS, NEAR))


@compiled
def steps_of(x: Any, most: int) -> Any:
    """The scale by which float32 `x` becomes integers of at most `most`, and what to multiply it
    with: NaN and 0 where x has a NaN, or an inf."""
    # As integers the largest is found some at a time: a float32's order is that of its bits.
    bits, largest = x.view(np.uint32), np.uint32(0)
    for k in range(bits.shape[0]):
        size = np.uint32(bits[k] & SIZE)
        if size > largest:
            largest = size
    if largest >= INFINITE:
        return np.float32(np.nan), np.float32(0)
    scale = np.uint32(largest).view(np.float32) / np.float32(most)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    if inverse > LARGEST_FLOAT:  # of numbers next to nothing
        inverse = np.float32(0)
    return scale, inverse


@compiled
def round_at(x: Any, most: int, out: Any) -> Any:
    """Fills int16 `out` with the nearest to x ÷ what it returns, at most `most`: NaN where x has
    one, or an inf."""
    scale, inverse = steps_of(x, most)
    if inverse == 0:  # a product of 0 and NaN would be no number
        out[:] = 0
        return scale
    for k in range(x.shape[0]):
        out[k] = np.int16(np.rint(x[k] * inverse))
    return scale


@compiled
def round8(xs: Any, numbers: Any, scales: Any) -> None:
    """Rounds vectors as `dot8_at` takes them: `xs` float32 and `numbers` int16 [vectors, width],
    `scales` float32 [vectors]."""
    for v in range(xs.shape[0]):
        scales[v] = round_at(xs[v], LARGEST, numbers[v])


@compiled
def round4(xs: Any, numbers: Any, scales: Any, sums: Any) -> None:
    """The same as `dot4_at` takes them; `sums` float32 [vectors, groups]."""
    rounded = np.empty(xs.shape[1], np.int16)
    for v in range(xs.shape[0]):
        scales[v] = round_at(xs[v], LARGEST, rounded)
        _by_words(rounded, numbers[v])
        for g in range(sums.shape[1]):
            total = np.float32(0)
            for k in range(g * GROUP, (g + 1) * GROUP):
                total += np.float32(rounded[k])
            sums[v, g] = total


def _lowest_bits(_: Any, items: Any, start: Any) -> Any:
    """The lowest bits of SCALED numbers from `start` on, the first one's lowest."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = item_at(context, builder, signature.args[0], given[0], given[1])
        bits = builder.trunc(load(builder, place, I8, SCALED), of(ir.IntType(1), SCALED))
        return builder.bitcast(bits, I16)

    return types.int16(items, types.int64), make


_bits_at: Any = intrinsic(_lowest_bits)


@compiled
def scale_at(items: Any, start: Any) -> Any:
    """The scale of the int8 row at `start`. No slice of the items is made: to count who holds one
    would have each row wait for the one before (docs/measurements.md)."""
    return real(_bits_at(items, start))


@in_order
def dot8_at(
    items: Any, starts: Any, numbers: Any, scales: Any, first: int, end: int, out: Any
) -> None:
    """For i from `first` to `end`, out[v, i] = (the int8 row that begins at starts[i]) · vector v,
    rounded by `round8`. To the same bits whatever vectors and rows are beside it."""
    vectors, width = numbers.shape
    made = np.empty(ROWS * VECTORS, np.float32)
    if vectors == 1 and one_after_another(starts, first, end, width):
        for i in range(first, end, ROWS_BEHIND):
            made[:] = 0
            _one_behind8(items, starts, i, numbers, 0, made)
            for r in range(i, min(i + ROWS_BEHIND, end)):
                out[0, r] = made[r - i] * (scales[0] * scale_at(items, starts[r]))
        return
    fours = vectors - vectors % VECTORS
    for i in range(first, end, ROWS):
        stop = min(i + ROWS, end)
        for v in range(0, fours, VECTORS):
            for j in range(i, stop, ROWS_BY_FOUR):
                made[:] = 0
                _four8(items, starts, j, numbers, v, made)
                for r in range(j, min(j + ROWS_BY_FOUR, stop)):
                    of_row = scale_at(items, starts[r])
                    for n in range(VECTORS):
                        out[v + n, r] = made[(r - j) * VECTORS + n] * (scales[v + n] * of_row)
        for v in range(fours, vectors):
            made[:] = 0
            _one8(items, starts, i, numbers, v, made)
            for r in range(i, stop):
                out[v, r] = made[r - i] * (scales[v] * scale_at(items, starts[r]))


@in_order
def dot4_at(
    items: Any, starts: Any, numbers: Any, scales: Any, sums: Any, first: int, end: int, out: Any
) -> None:
    """The same of int4 rows, and of vectors rounded by `round4`."""
    vectors = numbers.shape[0]
    made = np.empty(ROWS * VECTORS, np.float32)
    fours = vectors - vectors % VECTORS
    for i in range(first, end, ROWS):
        stop = min(i + ROWS, end)
        for v in range(0, fours, VECTORS):
            for j in range(i, stop, ROWS_BY_FOUR):
                made[:] = 0
                _four4(items, starts, j, numbers, v, made, sums)
                for r in range(j, min(j + ROWS_BY_FOUR, stop)):
                    for n in range(VECTORS):
                        out[v + n, r] = made[(r - j) * VECTORS + n] * scales[v + n]
        for v in range(fours, vectors):
            made[:] = 0
            _one4(items, starts, i, numbers, v, made, sums)
            for r in range(i, stop):
                out[v, r] = made[r - i] * scales[v]


@compiled
def _by_words(x: Any, out: Any) -> None:
    """Fills `out` with `x` in the order in which `sums4` takes it: of every two groups the numbers
    that lie in the lowest four bits of their words, then of the next four; of a last one alike."""
    groups = x.shape[0] // GROUP
    for g in range(groups):
        words = WORDS if g == groups - 1 and g % 2 == 0 else 2 * WORDS
        at = g // 2 * 2 * GROUP + g % 2 * WORDS
        for w in range(WORDS):
            k = g * GROUP + 2 * w
            out[at + w], out[at + 2 * words + w] = x[k], x[k + 1]
            k += GROUP // 2
            out[at + words + w], out[at + 3 * words + w] = x[k], x[k + 1]
