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
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels import compiled, real
from common.store.geometry import GROUP, SCALED

LARGEST = 32767  # of the rounded vector
CHUNK = 512  # numbers of an int8 row whose products add up within int32: 512 × 128 × 32767
LANES = 8

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FAST = ("reassoc", "contract", "nsz")


def _plus(_: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a × b in int32, where numba's own arithmetic would take int64."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        product = builder.mul(builder.sext(given[1], _I32), builder.sext(given[2], _I32))
        return builder.add(given[0], product)

    return types.int32(types.int32, types.int8, types.int16), make


def _of(element: Any, count: int) -> Any:
    return ir.VectorType(element, count)


def _every(element: Any, count: int, value: Any) -> Any:
    return ir.Constant(_of(element, count), [value] * count)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """To an item of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, element: Any, count: int) -> Any:
    loaded = builder.load(builder.bitcast(pointer, _of(element, count).as_pointer()))
    loaded.align = 1
    return loaded


def _pick(builder: Any, vector: Any, chosen: range) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(_of(_I32, len(chosen)), list(chosen)))


def _pairs(builder: Any, nibbles: Any, by: Any) -> Any:
    """int32 [8] of uint8 [16] and int16 [16]: their products, neighbours added. Written so that
    LLVM knows it for the one instruction that it is on x86."""
    wide = _of(_I32, 2 * LANES)
    products = builder.mul(builder.zext(nibbles, wide), builder.sext(by, wide))
    even, odd = (_pick(builder, products, range(first, 2 * LANES, 2)) for first in (0, 1))
    return builder.add(even, odd)


def _total(builder: Any, lanes: Any) -> Any:
    """The sum of float32 [8]."""
    for count in (4, 2, 1):
        halves = (_pick(builder, lanes, range(first, first + count)) for first in (0, count))
        lanes = builder.fadd(*halves, flags=_FAST)
    return builder.extract_element(lanes, ir.Constant(_I32, 0))


def _half_at(builder: Any, pointer: Any, index: Any) -> Any:
    """A float16 as float32."""
    loaded = builder.load(builder.gep(pointer, [index]))
    loaded.align = 2
    return builder.fpext(loaded, _FLOAT)


def _sum4(_: Any, items: Any, start: Any, x: Any, sums: Any, groups: Any) -> Any:
    """The int4 row at `start` times `x`, int16; `sums` float32 [groups] are those of x's groups.

    By hand, since a group's products are to become float32, and take its scale, as vectors: numba
    adds each group up to one number first, or gathers from several groups, which takes twice as
    long."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        zero, half = ir.Constant(_I64, 0), GROUP // 2
        row = _pointer(context, builder, signature.args[0], given[0], given[1])
        vector = _pointer(context, builder, signature.args[2], given[2], zero)
        sum_of = _pointer(context, builder, signature.args[3], given[3], zero)
        ends = builder.gep(row, [builder.mul(given[4], ir.Constant(_I64, half))])
        scales = builder.bitcast(ends, ir.HalfType().as_pointer())
        minima = builder.gep(scales, [given[4]])
        lanes = cgutils.alloca_once_value(builder, _every(_FLOAT, LANES, 0.0))
        least = cgutils.alloca_once_value(builder, ir.Constant(_FLOAT, 0.0))
        with cgutils.for_range(builder, given[4]) as loop:
            g = loop.index
            at = builder.gep(row, [builder.mul(g, ir.Constant(_I64, half))])
            by = builder.gep(vector, [builder.mul(g, ir.Constant(_I64, GROUP))])
            packed = _load(builder, at, _I8, half)
            low = builder.and_(packed, _every(_I8, half, 15))
            high = builder.lshr(packed, _every(_I8, half, 4))
            there = builder.gep(by, [ir.Constant(_I64, half)])
            products = builder.add(
                _pairs(builder, low, _load(builder, by, _I16, half)),
                _pairs(builder, high, _load(builder, there, _I16, half)),
            )
            scale = builder.insert_element(
                ir.Constant(_of(_FLOAT, LANES), ir.Undefined),
                _half_at(builder, scales, g), ir.Constant(_I32, 0),
            )  # fmt: skip
            scale = builder.shuffle_vector(scale, scale, _every(_I32, LANES, 0))
            wide = builder.sitofp(products, _of(_FLOAT, LANES))
            scaled = builder.fmul(wide, scale, flags=_FAST)
            builder.store(builder.fadd(builder.load(lanes), scaled, flags=_FAST), lanes)
            part = builder.load(builder.gep(sum_of, [g]))
            part = builder.fmul(_half_at(builder, minima, g), part, flags=_FAST)
            builder.store(builder.fadd(builder.load(least), part, flags=_FAST), least)
        return builder.fadd(_total(builder, builder.load(lanes)), builder.load(least))

    return types.float32(items, types.int64, x, sums, types.int64), make


plus: Any = intrinsic(_plus)
sum4: Any = intrinsic(_sum4)


@compiled
def _rounded(x: Any, out: Any) -> Any:
    """Fills int16 `out` with the nearest to x ÷ what it returns: NaN where x has one, or an inf."""
    largest, spoilt = np.float32(0), np.float32(0)
    for k in range(x.shape[0]):
        largest = max(largest, abs(x[k]))
        spoilt += x[k] * np.float32(0)
    scale = largest / np.float32(LARGEST)
    inverse = np.float32(1) / scale if scale > 0 and spoilt == 0 else np.float32(0)
    for k in range(x.shape[0]):
        out[k] = np.int16(np.rint(x[k] * inverse)) if inverse > 0 else np.int16(0)
    return scale + spoilt


@compiled
def scale_at(items: Any, start: Any) -> Any:
    """The scale of the int8 row at `start`."""
    eights = items[start : start + SCALED].view(np.uint64)
    return real(np.int16(_low_bits(eights[0]) | _low_bits(eights[1]) << np.uint64(8)))


@compiled
def _low_bits(eight: Any) -> Any:
    """The lowest bits of eight numbers, the first one's lowest: 2^(8 i) becomes 2^(56 + i)."""
    return (eight & np.uint64(0x0101010101010101)) * np.uint64(0x0102040810204080) >> np.uint64(56)


@compiled
def dot8_at(items: Any, starts: Any, x: Any, out: Any) -> None:
    """`dot_at` of int8 rows, times their scales."""
    width = x.shape[0]
    rounded = np.empty(width, np.int16)
    scale = _rounded(x, rounded)
    for i in range(starts.shape[0]):
        total = np.float32(0)
        for first in range(0, width, CHUNK):
            by = rounded[first : min(first + CHUNK, width)]
            row, part = items[starts[i] + first : starts[i] + width], np.int32(0)
            for k in range(by.shape[0]):
                part = plus(part, row[k], by[k])
            total += np.float32(part)
        out[i] = total * (scale * scale_at(items, starts[i]))


@compiled
def dot4_at(items: Any, starts: Any, x: Any, out: Any) -> None:
    """`dot_at` of int4 rows."""
    groups = x.shape[0] // GROUP
    rounded, sums = np.empty(x.shape[0], np.int16), np.zeros(groups, np.float32)
    scale = _rounded(x, rounded)
    for g in range(groups):
        for k in range(GROUP):
            sums[g] += np.float32(rounded[g * GROUP + k])
    for i in range(starts.shape[0]):
        out[i] = sum4(items, starts[i], rounded, sums, groups) * scale
