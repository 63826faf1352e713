"""Products of rows of floats, and of plain integers, with vectors of float32; and their sums.

Each number becomes float32 in a register; nothing is gathered, converted or copied first. Numbers
are named as in common/kernels.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from common.kernels import compiled, one_after_another, widened
from common.vectors import (
    FLOAT,
    LANES,
    LINE_BYTES,
    NEAR,
    ROWS,
    SECOND,
    VECTORS,
    Rows,
    Several,
    every,
    item_at,
    load,
    number,
    spread,
    store,
    total,
)

STEP = 4 * LANES  # numbers of a row between two looks at whether it is over
FUSED = ("contract",)  # a product and a sum are rounded once, where the processor has it so


def _sums(rows: int, count: int, cache: int) -> Any:
    def make_for(_: Any, items: Any, starts: Any, i: Any, xs: Any, v: Any, made: Any) -> Any:
        """Of `items` the `rows` rows from starts[i] on, times `count` of `xs`, float32, from vector
        `v` on, added to `made` float32 [rows × vectors].

        What a row and a vector come to does not depend on those beside them, to the bit: LANES
        sums of their own, and one of what is left at the end."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            several = Several(context, builder, signature, given, rows, count)
            sums = several.sums(every(FLOAT, LANES, 0.0))
            rest = several.sums(every(FLOAT, 1, 0.0))
            element = context.get_data_type(items.dtype)

            def add(at: Any, lanes: int, to: list[list[Any]]) -> None:
                parts = [load(builder, builder.gep(x, [at]), FLOAT, lanes) for x in several.vectors]
                for row, those in zip(several.rows, to, strict=True):
                    numbers = load(builder, builder.gep(row, [at]), element, lanes)
                    numbers = widened(builder, numbers, items.dtype, lanes)
                    for part, each in zip(parts, those, strict=True):
                        made = builder.fmul(numbers, part, flags=FUSED)
                        builder.store(builder.fadd(builder.load(each), made, flags=FUSED), each)

            whole = builder.and_(several.width, number(-STEP))
            line = LINE_BYTES * 8 // items.dtype.bitwidth
            with several.steps(whole, STEP) as first:
                for after in range(0, STEP, LANES):
                    at = builder.add(first, number(after))
                    if after % line == 0:
                        several.ask(at, cache)
                    add(at, LANES, sums)
            with several.steps(several.width, 1, whole) as at:
                add(at, 1, rest)

            def value(row: int, vector: int) -> Any:
                both = (builder.load(each[row][vector]) for each in (sums, rest))
                return builder.fadd(*(total(builder, lanes) for lanes in both))

            several.add(value)
            return context.get_dummy_value()

        return types.void(items, starts, types.int64, xs, types.int64, made), make

    return make_for


# How many rows, and how near the next ones: as was fastest (docs/measurements.md).
_one_of_two: Any = intrinsic(_sums(2, 1, NEAR))
_one: Any = intrinsic(_sums(ROWS, 1, SECOND))
_four: Any = intrinsic(_sums(ROWS, VECTORS, SECOND))


@compiled
def dot_many_at(items: Any, starts: Any, xs: Any, first: int, end: int, out: Any) -> None:
    """For i from `first` to `end`, out[v, i] = (the row of `items` that begins at starts[i]) ·
    xs[v]. To the same bits whatever vectors and rows are beside it.

    `items` bits [any], contiguous; `starts` int64 [rows]; `xs` float32 [vectors, width]; `out`
    float32 [vectors, rows]. Each row comes from memory once.
    """
    vectors, width = xs.shape
    made = np.empty(ROWS * VECTORS, np.float32)
    if vectors == 1 and one_after_another(starts, first, end, width):
        for i in range(first, end, 2):
            made[:] = 0
            _one_of_two(items, starts, i, xs, 0, made)
            for r in range(i, min(i + 2, end)):
                out[0, r] = made[r - i]
        return
    fours = vectors - vectors % VECTORS
    for i in range(first, end, ROWS):
        stop = min(i + ROWS, end)
        for v in range(0, fours, VECTORS):
            made[:] = 0
            _four(items, starts, i, xs, v, made)
            for r in range(i, stop):
                for n in range(VECTORS):
                    out[v + n, r] = made[(r - i) * VECTORS + n]
        for v in range(fours, vectors):
            made[:] = 0
            _one(items, starts, i, xs, v, made)
            for r in range(i, stop):
                out[v, r] = made[r - i]


def _added(rows: int) -> Any:
    def make_for(
        _: Any, items: Any, starts: Any, i: Any, begin: Any, weights: Any, out: Any
    ) -> Any:
        """out += of the `rows` rows from starts[i] on, from number `begin`, each times its
        weight."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            some = Rows(context, builder, signature, given, rows)
            i, begin, weights, out = given[2:]
            kinds = signature.args[4:]
            to = context.make_array(kinds[1])(context, builder, out)
            width = builder.extract_value(to.shape, 0)
            element = context.get_data_type(items.dtype)
            by = [
                builder.load(
                    item_at(context, builder, kinds[0], weights, builder.add(i, number(r)))
                )
                for r in range(rows)
            ]

            def add(at: Any, lanes: int) -> None:
                place = builder.gep(to.data, [at])
                made = load(builder, place, FLOAT, lanes)
                for row, weight in zip(some.rows, by, strict=True):
                    numbers = load(
                        builder, builder.gep(row, [builder.add(begin, at)]), element, lanes
                    )
                    numbers = widened(builder, numbers, items.dtype, lanes)
                    made = builder.fadd(
                        made,
                        builder.fmul(numbers, spread(builder, weight, lanes), flags=FUSED),
                        flags=FUSED,
                    )
                store(builder, place, made)

            whole = builder.and_(width, number(-STEP))
            line = LINE_BYTES * 8 // items.dtype.bitwidth
            with some.steps(whole, STEP) as first:
                for after in range(0, STEP, LANES):
                    at = builder.add(first, number(after))
                    if after % line == 0:
                        some.ask(builder.add(begin, at), SECOND)
                    add(at, LANES)
            with some.steps(width, 1, whole) as at:
                add(at, 1)
            return context.get_dummy_value()

        return types.void(items, starts, types.int64, types.int64, weights, out), make

    return make_for


_add_one: Any = intrinsic(_added(1))
_add_four: Any = intrinsic(_added(ROWS))


@compiled
def add_range_at(
    items: Any, starts: Any, weights: Any, count: int, width: int, begin: int, out: Any
) -> None:
    """out += Σ weights[i] × (the row of `items` that begins at starts[i]), of its numbers those
    from `begin` on, as many as `out` has; of the first `count` rows. Those that come after are the
    next ones, which are asked for.

    `items` bits [any], contiguous; `starts` int64 and `weights` float32 [rows]; `out` float32
    [numbers]. ROWS rows at a time: so `out` goes through registers as much less often.
    """
    for i in range(0, count - ROWS + 1, ROWS):
        _add_four(items, starts, i, begin, weights, out)
    for i in range(count - count % ROWS, count):
        _add_one(items, starts, i, begin, weights, out)


@compiled
def add_at(items: Any, starts: Any, weights: Any, out: Any) -> None:
    """The same of whole rows: `out` float32 [width]."""
    add_range_at(items, starts, weights, starts.shape[0], out.shape[0], 0, out)
