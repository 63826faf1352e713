"""Packed rows: int8 and int4, in bundles and in memory, and products straight from them.

    int8   width bytes      numbers from -127 to 127 times the row's scale, a bfloat16 whose bit i
                            is the lowest bit of number i
    int4   width ÷ 2        by groups of GROUP numbers: number i of a group, 0 to 15, is the low
                            half of byte i, number i + GROUP ÷ 2 its high half
           width ÷ GROUP × 2   each group's scale, float16
           width ÷ GROUP × 2   each group's minimum, float16: a number stands for
                            minimum + number × scale

An int8 scale lies within the numbers because beside them it would not fit: two rows of 4,096 fill
two pages, with their scales they would take three. The numbers are chosen so that their lowest bits
come out right, which costs at most one step of a number in SCALED of them.

Rows are named by numpy's dtype, as in common/kernels.py: int8 are packed, uint8 are int4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from common.integer_dot import round4, round8, scale_at
from common.kernels import BITS, compiled, real, widen_at
from common.store.geometry import GROUP, SCALED, row_bytes
from common.vectors import FLOAT, I8, I32, VECTORS, every, item_at, load, number, of, spread, store

Bits = npt.NDArray[Any]
Starts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Vectors = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]

HALF = GROUP // 2
# How far below its extremes a group's range may end: cutting the two off can cost less than it
# brings the others. More candidates gained less than 1 % of the error.
RANGES = (1.0, 0.92, 0.85, 0.78)


def _nibble(shift: int) -> Any:
    def make_for(_: Any, byte: Any) -> Any:
        def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = builder.zext(arguments[0], ir.IntType(32))
            if shift:
                word = builder.lshr(word, ir.Constant(word.type, shift))
            else:
                word = builder.and_(word, ir.Constant(word.type, 15))
            return builder.sitofp(word, ir.FloatType())

        return types.float32(byte), make

    return make_for


def _half(_: Any, value: Any) -> Any:
    """The bits of the float16 that is nearest to a float32."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), make


def _group(_: Any, items: Any, begin: Any, scale: Any, least: Any, out: Any, at: Any) -> Any:
    """Fills float32 `out`, from `at` on, with what a group's numbers stand for, that begin at
    `begin`. LLVM leaves the loop that says so one number at a time."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = item_at(context, builder, signature.args[0], given[0], given[1])
        to = item_at(context, builder, signature.args[4], given[4], given[5])
        numbers = load(builder, place, I8, HALF)
        lows = builder.and_(numbers, every(I8, HALF, 15))
        highs = builder.lshr(numbers, every(I8, HALF, 4))
        by, plus = (spread(builder, value, HALF) for value in given[2:4])
        for first, some in ((0, lows), (HALF, highs)):
            wide = builder.sitofp(builder.zext(some, of(I32, HALF)), of(FLOAT, HALF))
            value = builder.fadd(plus, builder.fmul(wide, by))
            store(builder, builder.gep(to, [number(first)]), value)
        return context.get_dummy_value()

    return types.void(items, types.int64, types.float32, types.float32, out, types.int64), make


low: Any = intrinsic(_nibble(0))
high: Any = intrinsic(_nibble(4))
half: Any = intrinsic(_half)
widen_group: Any = intrinsic(_group)


@compiled
def _scales_at(items: Any, starts: Any, out: Any) -> None:
    """out[i] = the scale of the int8 row that begins at starts[i]."""
    for i in range(starts.shape[0]):
        out[i] = scale_at(items, starts[i])


@compiled
def add4_range_at(
    items: Any, starts: Any, weights: Any, count: int, width: int, begin: int, out: Any
) -> None:
    """`add_range_at` of int4 rows; `begin` is the first number of a group."""
    groups = out.shape[0] // GROUP
    first, packed, every = begin // GROUP, width // 2, width // GROUP
    size, sums = packed + every * 4, out.reshape(groups, GROUP)
    for i in range(0, count - 1, 2):
        a, b = items[starts[i] : starts[i] + size], items[starts[i + 1] : starts[i + 1] + size]
        halves_a, halves_b = a[packed:].view(np.uint16), b[packed:].view(np.uint16)
        bytes_a = a[:packed].reshape(every, HALF)[first:]
        bytes_b = b[:packed].reshape(every, HALF)[first:]
        v, w = weights[i], weights[i + 1]
        for g in range(groups):
            p, q = real(halves_a[first + g]) * v, real(halves_b[first + g]) * w
            least = real(halves_a[every + first + g]) * v + real(halves_b[every + first + g]) * w
            for k in range(HALF):
                sums[g, k] += low(bytes_a[g, k]) * p + low(bytes_b[g, k]) * q + least
                sums[g, k + HALF] += high(bytes_a[g, k]) * p + high(bytes_b[g, k]) * q + least
    if count % 2:
        a, v = items[starts[count - 1] : starts[count - 1] + size], weights[count - 1]
        halves_a, bytes_a = a[packed:].view(np.uint16), a[:packed].reshape(every, HALF)[first:]
        for g in range(groups):
            p, least = real(halves_a[first + g]) * v, real(halves_a[every + first + g]) * v
            for k in range(HALF):
                sums[g, k] += low(bytes_a[g, k]) * p + least
                sums[g, k + HALF] += high(bytes_a[g, k]) * p + least


@compiled
def _widen4_at(items: Any, starts: Any, width: int, begin: int, out: Any) -> None:
    """`widen_at` of int4 rows of `width` numbers, from number `begin`, the first of a group."""
    groups, every = out.shape[1] // GROUP, width // GROUP
    first, packed = begin // GROUP, width // 2
    for i in range(starts.shape[0]):
        row = items[starts[i] : starts[i] + packed + every * 4]
        halves, to = row[packed:].view(np.uint16), out[i]
        for g in range(groups):
            scale, least = real(halves[first + g]), real(halves[every + first + g])
            widen_group(row, (first + g) * HALF, scale, least, to, g * GROUP)


def widen_range_at(items: Any, starts: Any, width: int, begin: int, out: Any) -> None:
    """`widen_at` of rows of `width` numbers, from number `begin`, as many as `out` has: of any
    format; of int8 rows without their scales, of int4 ones `begin` is the first of a group."""
    raise NotImplementedError  # kernels take what is below


@overload(widen_range_at, strict=False)  # its names, with their types, are those of the others
def _which_widens(items: Any, starts: Any, width: Any, begin: Any, out: Any) -> Callable[..., None]:
    if items.dtype == types.uint8:
        return lambda items, starts, width, begin, out: _widen4_at(items, starts, width, begin, out)
    return lambda items, starts, width, begin, out: widen_at(items, starts + begin, out)


@compiled
def _pack8_at(rows: Any, items: Any, starts: Any) -> None:
    """Writes float32 `rows` as int8 rows that begin at `starts` of `items`."""
    for i in range(rows.shape[0]):
        row, to = rows[i], items[starts[i] : starts[i] + rows.shape[1]]
        largest = np.float32(0)
        for k in range(row.shape[0]):
            largest = max(largest, abs(row[k]))
        # The bfloat16 above: the largest number is 127 at most.
        bits = _bfloat16_above(largest / np.float32(127))
        scale = real(np.int16(bits))
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for k in range(row.shape[0]):
            to[k] = np.int8(np.rint(row[k] * inverse))
        for k in range(SCALED):
            bit = (bits >> k) & 1
            number = np.rint((row[k] * inverse - bit) / 2) * 2 + bit
            to[k] = np.int8(min(max(number, -128 + bit), 126 + bit))


@compiled
def _bfloat16_above(value: Any) -> int:
    """The bits of the smallest bfloat16 that is not below a positive `value`."""
    bits = np.array([value], np.float32).view(np.int32)[0]
    return (bits + 0xFFFF) >> 16


@compiled
def _pack4_at(rows: Any, items: Any, starts: Any) -> None:
    """Writes float32 `rows` as int4 rows that begin at `starts` of `items`."""
    width = rows.shape[1]
    groups, packed = width // GROUP, width // 2
    numbers, best = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    for i in range(rows.shape[0]):
        to = items[starts[i] : starts[i] + packed + groups * 4]
        halves, all_values = to[packed:].view(np.uint16), rows[i].reshape(groups, GROUP)
        for g in range(groups):
            values = all_values[g]
            lowest, highest = values.min(), values.max()
            smallest = np.float32(np.inf)
            halves[g], halves[groups + g] = half(np.float32(0)), half(lowest)
            best[:] = 0
            for share in RANGES:
                scale = (highest - lowest) * np.float32(share / 15)
                least = (highest + lowest) * np.float32(0.5) - scale * np.float32(7.5)
                _number(values, scale, least, numbers)
                scale, least = _fitted(values, numbers, scale, least)
                bits = half(scale), half(least)
                scale, least = real(bits[0]), real(bits[1])
                error = _number(values, scale, least, numbers)
                if error < smallest:
                    smallest, best[:] = error, numbers
                    halves[g], halves[groups + g] = bits
            for k in range(HALF):
                to[g * HALF + k] = np.uint8(best[k]) | (np.uint8(best[k + HALF]) << 4)


@compiled
def _number(values: Any, scale: Any, least: Any, numbers: Any) -> Any:
    """The numbers nearest to a group's values, and the squared error of what they stand for."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    error = np.float32(0)
    for k in range(values.shape[0]):
        number = np.rint((values[k] - least) * inverse)
        numbers[k] = min(max(number, np.float32(0)), np.float32(15))
        error += (least + numbers[k] * scale - values[k]) ** 2
    return error


@compiled
def _fitted(values: Any, numbers: Any, scale: Any, least: Any) -> Any:
    """The scale and minimum with the smallest squared error for these numbers."""
    count = np.float32(values.shape[0])
    number, value = numbers.sum() / count, values.sum() / count
    shared, spread = np.float32(0), np.float32(0)
    for k in range(values.shape[0]):
        shared += (numbers[k] - number) * (values[k] - value)
        spread += (numbers[k] - number) ** 2
    if spread > 0 and shared > 0:
        scale = shared / spread
        least = value - scale * number
    return scale, least


def pack_rows(rows: Floats, items: Bits, starts: Starts) -> None:
    """Packs `rows` float32 [count, width] into `items`, contiguous: row i begins at starts[i]."""
    (_pack4_at if items.dtype == np.uint8 else _pack8_at)(rows, items, starts)


def vectors_for(items: Bits, xs: Floats) -> Vectors:
    """Vectors `xs` [vectors, width] as products of rows take them, what they are rounded to, their
    scales, and the sums of their groups: packed rows take int16, other rows them as they are. With
    some of zeros, where several together take less time than two or three by themselves."""
    few, width = xs.shape
    if (left := few % VECTORS) > 1:
        xs = np.concatenate([xs, np.zeros((VECTORS - left, width), np.float32)])
        few = len(xs)
    packed, groups = items.dtype in (np.int8, np.uint8), 0
    if items.dtype == np.uint8:
        groups = width // GROUP
    scales, sums = np.empty(few if packed else 0, np.float32), np.empty((few, groups), np.float32)
    if not packed:
        return np.ascontiguousarray(xs), scales, sums
    numbers = np.empty((few, width), np.int16)
    if groups:
        round4(xs, numbers, scales, sums)
    else:
        round8(xs, numbers, scales)
    return numbers, scales, sums


def scales_of(items: Bits, starts: Starts) -> Floats:
    """The scales of int8 rows, float32 [rows]."""
    scales = np.empty(len(starts), np.float32)
    _scales_at(items, starts, scales)
    return scales


def widen_rows(items: Bits, starts: Starts, width: int, begin: int, out: Floats) -> None:
    """`widen_at` of rows of `width` numbers, from number `begin`, of any format. `begin` is a
    multiple of GROUP."""
    if items.dtype == np.uint8:
        _widen4_at(items, starts, width, begin, out)
        return
    widen_at(items, starts + begin, out)
    if items.dtype == np.int8:
        out *= scales_of(items, starts)[:, None]


def packed(rows: Floats, number_format: str) -> npt.NDArray[np.uint8]:
    """uint8 [count, row_bytes] of finite float32 [count, width]."""
    size = row_bytes(number_format, rows.shape[1])
    raw = np.zeros((len(rows), size), np.uint8)
    items = raw.reshape(-1).view(BITS[number_format])
    pack_rows(rows, items, np.arange(len(rows), dtype=np.int64) * size)
    return raw


def unpacked(raw: npt.NDArray[np.uint8], number_format: str, width: int) -> Floats:
    """float32 [count, width] of packed rows, uint8 [count, row_bytes] with contiguous rows."""
    items = np.ascontiguousarray(raw).reshape(-1).view(BITS[number_format])
    starts = np.arange(len(raw), dtype=np.int64) * row_bytes(number_format, width)
    out = np.empty((len(raw), width), np.float32)
    widen_rows(items, starts, width, 0, out)
    return out
