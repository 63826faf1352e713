"""Products of a matrix of many short int8 rows with a few vectors, COLUMNS of its rows at a time;
in integers: common/integer_dot.py says why.

The matrix lies by columns, so that numbers of neighbouring rows are multiplied at once; two numbers
of each row lie together, for one instruction multiplies and adds pairs; and in blocks of so many
rows as registers have sums for: what comes next lies next in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.integer_dot import PAIRS, pairs, round8
from common.kernels import compiled
from common.packed import Floats
from common.vectors import (
    FIRST,
    FLOAT,
    I8,
    I16,
    I32,
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
)

AHEAD = 4096  # bytes that are asked of memory before they are multiplied
COLUMNS = 4 * LANES  # rows of the matrix, whose sums for four vectors fill sixteen registers
CHUNK = 512  # numbers of a row whose products add up within int32: 512 × 127 × 32767


def blocks_of(matrix: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """`matrix` [rows, width] as it is multiplied: [blocks, width ÷ 2, COLUMNS, 2], with zeros where
    rows or a number of each are missing."""
    rows, width = matrix.shape
    padded = np.zeros((-(-rows // COLUMNS) * COLUMNS, width + width % 2), np.int8)
    padded[:rows, :width] = matrix
    by_pairs = padded.reshape(-1, COLUMNS, padded.shape[1] // 2, 2)
    return np.ascontiguousarray(by_pairs.swapaxes(1, 2))


def _spread_pair(builder: Any, pointer: Any) -> Any:
    """LANES times the two int16 at a pointer."""
    pair = builder.load(builder.bitcast(pointer, I32.as_pointer()))
    pair.align = 2
    return builder.bitcast(spread(builder, pair, LANES), of(I16, PAIRS))


def _sums(count: int) -> Any:
    def make_for(
        _: Any, values: Any, begin: Any, xs: Any, v: Any, first: Any, end: Any, out: Any, at: Any
    ) -> Any:
        """Of the block that begins at values[begin] the products with `count` of `xs` int16
        [vectors, width], of their numbers from `first` to `end`, from vector `v` on: they are put
        at column `at` of their rows of `out`."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            values, begin, xs, v, first, end, out, at = given
            kinds = signature.args
            vectors = rows_at(context, builder, kinds[2], xs, v, count)
            rows = rows_at(context, builder, kinds[6], out, v, count)
            parts = range(0, COLUMNS, LANES)
            zero = every(I32, LANES, 0)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in parts] for _ in vectors]
            with cgutils.for_range_slice(builder, first, end, number(2)) as (k, _):
                by = [_spread_pair(builder, builder.gep(x, [k])) for x in vectors]
                line = builder.add(begin, builder.mul(k, number(COLUMNS)))
                coming = builder.add(line, number(AHEAD))
                ask_for(builder, item_at(context, builder, kinds[0], values, coming), FIRST)
                for place, part in enumerate(parts):
                    where = builder.add(line, number(2 * part))
                    where = item_at(context, builder, kinds[0], values, where)
                    some = load(builder, where, I8, PAIRS)
                    for each, those in zip(by, sums, strict=True):
                        made = pairs(builder, some, each)
                        builder.store(builder.add(builder.load(those[place]), made), those[place])
            for row, those in zip(rows, sums, strict=True):
                for part, total in zip(parts, those, strict=True):
                    column = builder.gep(row, [builder.add(at, number(part))])
                    made = builder.sitofp(builder.load(total), of(FLOAT, LANES))
                    store(builder, column, builder.fadd(load(builder, column, FLOAT, LANES), made))
            return context.get_dummy_value()

        given = (values, types.int64, xs, types.int64, types.int64, types.int64, out, types.int64)
        return types.void(*given), make

    return make_for


_one, _two, _three, _four = (intrinsic(_sums(count)) for count in range(1, VECTORS + 1))


@compiled
def _sums_at(values: Any, xs: Any, scales: Any, out: Any) -> None:
    few, width = xs.shape
    for b in range(out.shape[1] // COLUMNS):
        begin, at = b * COLUMNS * width, b * COLUMNS
        for first in range(0, width, CHUNK):
            end = min(first + CHUNK, width)
            for v in range(0, few, VECTORS):
                left = few - v
                if left >= VECTORS:
                    _four(values, begin, xs, v, first, end, out, at)
                elif left == 3:
                    _three(values, begin, xs, v, first, end, out, at)
                elif left == 2:
                    _two(values, begin, xs, v, first, end, out, at)
                else:
                    _one(values, begin, xs, v, first, end, out, at)
        for v in range(few):
            out[v, at : at + COLUMNS] *= scales[v]


def sums_of(blocks: npt.NDArray[np.int8], rows: int, xs: Floats) -> Floats:
    """The products of the matrix's `rows` rows with a few vectors, `xs` float32 [vectors, width],
    each rounded to int16 by its largest value: float32 [vectors, rows]. What a vector comes to does
    not depend on those beside it."""
    few, width = xs.shape
    numbers, scales = np.zeros((few, 2 * blocks.shape[1]), np.int16), np.empty(few, np.float32)
    round8(xs, numbers[:, :width], scales)
    out = np.zeros((few, len(blocks) * COLUMNS), np.float32)
    _sums_at(blocks.reshape(-1), numbers, scales, out)
    return np.ascontiguousarray(out[:, :rows])
