"""Products of a matrix of many short int8 rows with a few vectors, COLUMNS of its rows at a time.

The matrix lies by columns, so that numbers of neighbouring rows are multiplied at once, and in
blocks of so many rows as registers have sums for: what comes next lies next in memory, and is made
float32 once for four vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.float_rows import FUSED
from common.kernels import compiled
from common.packed import Floats
from common.vectors import (
    FIRST,
    FLOAT,
    I8,
    LANES,
    VECTORS,
    ask_for,
    every,
    item_at,
    load,
    number,
    of,
    rows_at,
    spread,
    store,
    width_of,
)

AHEAD = 4096  # bytes that are asked of memory before they are multiplied
COLUMNS = 4 * LANES  # rows of the matrix, whose sums for four vectors fill sixteen registers


def blocks_of(matrix: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """`matrix` [rows, width] as it is multiplied: [blocks, width, COLUMNS], zeros at the end."""
    rows, width = matrix.shape
    padded = np.zeros((-(-rows // COLUMNS) * COLUMNS, width), np.int8)
    padded[:rows] = matrix
    return np.ascontiguousarray(padded.reshape(-1, COLUMNS, width).swapaxes(1, 2))


def _sums(count: int) -> Any:
    def make_for(_: Any, values: Any, begin: Any, xs: Any, v: Any, out: Any, at: Any) -> Any:
        """Of the block that begins at values[begin] the products with `count` of `xs` float32
        [vectors, width] from vector v on: they are put at column `at` of their rows of `out`."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            vectors = rows_at(context, builder, xs, given[2], given[3], count)
            rows = rows_at(context, builder, out, given[4], given[3], count)
            parts = range(0, COLUMNS, LANES)
            zero = every(FLOAT, LANES, 0.0)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in parts] for _ in vectors]
            with cgutils.for_range(builder, width_of(context, builder, xs, given[2])) as loop:
                by = [
                    spread(builder, builder.load(builder.gep(x, [loop.index])), LANES)
                    for x in vectors
                ]
                first = builder.add(given[1], builder.mul(loop.index, number(COLUMNS)))
                coming = builder.add(first, number(AHEAD))
                ask_for(builder, item_at(context, builder, values, given[0], coming), FIRST)
                for place, part in enumerate(parts):
                    where = item_at(
                        context, builder, values, given[0], builder.add(first, number(part))
                    )
                    numbers = load(builder, where, I8, LANES)
                    numbers = builder.sitofp(numbers, of(FLOAT, LANES))
                    for weight, those in zip(by, sums, strict=True):
                        made = builder.fmul(numbers, weight, flags=FUSED)
                        total = builder.fadd(builder.load(those[place]), made, flags=FUSED)
                        builder.store(total, those[place])
            for row, those in zip(rows, sums, strict=True):
                for part, total in zip(parts, those, strict=True):
                    column = builder.add(given[5], number(part))
                    store(builder, builder.gep(row, [column]), builder.load(total))
            return context.get_dummy_value()

        return types.void(values, types.int64, xs, types.int64, out, types.int64), make

    return make_for


_one, _two, _three, _four = (intrinsic(_sums(count)) for count in range(1, VECTORS + 1))


@compiled
def _sums_at(values: Any, xs: Any, out: Any) -> None:
    few, width = xs.shape
    for b in range(out.shape[1] // COLUMNS):
        begin, at = b * COLUMNS * width, b * COLUMNS
        for v in range(0, few, VECTORS):
            left = few - v
            if left >= VECTORS:
                _four(values, begin, xs, v, out, at)
            elif left == 3:
                _three(values, begin, xs, v, out, at)
            elif left == 2:
                _two(values, begin, xs, v, out, at)
            else:
                _one(values, begin, xs, v, out, at)


def sums_of(blocks: npt.NDArray[np.int8], rows: int, xs: Floats) -> Floats:
    """The products of the matrix's `rows` rows with a few vectors, `xs` float32 [vectors, width]:
    float32 [vectors, rows]. What a vector comes to does not depend on those beside it."""
    out = np.empty((len(xs), len(blocks) * COLUMNS), np.float32)
    _sums_at(blocks.reshape(-1), np.ascontiguousarray(xs), out)
    return np.ascontiguousarray(out[:, :rows])
