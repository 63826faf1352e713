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

from common.kernels import TILE_ROWS, compiled, real
from common.store.geometry import GROUP, SCALED

LARGEST = 32767  # of the rounded vector
LANES = 8
PAIRS = 2 * LANES  # numbers that one instruction multiplies, adding neighbours
CHUNK = 4096  # numbers of an int8 row whose products add up within int32: 512 × 128 × 32767 a lane
WORD = 4  # numbers of an int4 row in 16 bits
WORDS = GROUP // WORD

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FUSED = ("contract",)  # in no other order: a row comes to the same bits, whatever is beside it


def _of(element: Any, count: int) -> Any:
    return ir.VectorType(element, count)


def _every(element: Any, count: int, value: Any) -> Any:
    return ir.Constant(_of(element, count), [value] * count)


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """To an item of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, element: Any, count: int) -> Any:
    loaded = builder.load(builder.bitcast(pointer, _of(element, count).as_pointer()))
    loaded.align = 1
    return loaded


def _ask_for(builder: Any, pointer: Any) -> None:
    """Has the cache line at a pointer brought, and goes on."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
    to_read, to_keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    builder.call(prefetch, [pointer, to_read, to_keep, data])


def _pick(builder: Any, vector: Any, chosen: Any) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(_of(_I32, len(chosen)), list(chosen)))


def _pairs(builder: Any, numbers: Any, by: Any) -> Any:
    """int32 [n ÷ 2] of two vectors of integers [n]: their products, neighbours added. Written so
    that LLVM knows it for the one instruction that it is on x86."""
    count = numbers.type.count
    wide = _of(_I32, count)
    products = builder.mul(builder.sext(numbers, wide), builder.sext(by, wide))
    even, odd = (_pick(builder, products, range(first, count, 2)) for first in (0, 1))
    return builder.add(even, odd)


def _total(builder: Any, lanes: Any) -> Any:
    """The sum of float32 [8]."""
    for count in (4, 2, 1):
        halves = (_pick(builder, lanes, range(first, first + count)) for first in (0, count))
        lanes = builder.fadd(*halves)
    return builder.extract_element(lanes, ir.Constant(_I32, 0))


class _Two:
    """Two rows of `items`, the two that come after them, and a sum for each; what the kernels have
    in common. While two rows are multiplied the next two are asked for: without it int8 rows came
    from memory at two thirds of this speed, and int4 rows at half (docs/measurements.md)."""

    ARGUMENTS = (types.int64,) * 4  # where the rows begin: two, and the next two

    def __init__(self, context: Any, builder: Any, items: Any, given: Any, zero: Any):
        """`items` the array's type, `given` the array and the ARGUMENTS, `zero` of the sums."""
        self._context, self._builder = context, builder
        self.rows = [_pointer(context, builder, items, given[0], at) for at in given[1:3]]
        self._next = [_pointer(context, builder, items, given[0], at) for at in given[3:5]]
        self.sums = [cgutils.alloca_once_value(builder, zero) for _ in self.rows]

    def ask(self, at: Any) -> None:
        """For byte `at` of the next two."""
        for row in self._next:
            _ask_for(self._builder, self._builder.gep(row, [at]))

    def pair(self, totals: Any) -> Any:
        return self._context.make_tuple(self._builder, types.UniTuple(types.float32, 2), totals)


def _sums8(
    _: Any, items: Any, a: Any, b: Any, c: Any, d: Any, x: Any, first: Any, count: Any
) -> Any:
    """Of the int8 rows at `a` and `b` the numbers from `first` on, `count`, a multiple of PAIRS and
    at most CHUNK, times those of `x`, int16: two float32. The rows at `c` and `d` come next."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        two = _Two(context, builder, signature.args[0], given, _every(_I32, LANES, 0))
        x, first, count = given[5:]
        vector = _pointer(context, builder, signature.args[5], x, _number(0))
        with cgutils.for_range_slice(builder, first, builder.add(first, count), _number(PAIRS)) as (
            at,
            _,
        ):
            by = _load(builder, builder.gep(vector, [at]), _I16, PAIRS)
            two.ask(at)
            for row, total in zip(two.rows, two.sums, strict=True):
                numbers = _load(builder, builder.gep(row, [at]), _I8, PAIRS)
                builder.store(builder.add(builder.load(total), _pairs(builder, numbers, by)), total)
        lanes = (builder.sitofp(builder.load(each), _of(_FLOAT, LANES)) for each in two.sums)
        return two.pair([_total(builder, each) for each in lanes])

    return types.UniTuple(types.float32, 2)(items, *_Two.ARGUMENTS, x, first, count), make


def _sums4(_: Any, items: Any, a: Any, b: Any, c: Any, d: Any, x: Any, groups: Any) -> Any:
    """The numbers of the int4 rows at `a` and `b`, each times its group's scale, times `x`, int16
    by words (`_by_words`): two float32. The rows at `c` and `d` come next.

    Two groups' numbers lie in PAIRS words. A shift and a mask make int16 of them that are
    multiplied as they are; a group's products are the half of the lanes that takes its scale."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        two = _Two(context, builder, signature.args[0], given, _every(_FLOAT, LANES, 0.0))
        x, groups = given[5:]
        vector = _pointer(context, builder, signature.args[5], x, _number(0))
        ends = builder.mul(groups, _number(GROUP // 2))
        scales = [
            builder.bitcast(builder.gep(row, [ends]), ir.HalfType().as_pointer())
            for row in two.rows
        ]

        def add(group: Any, count: int) -> None:
            """`count` groups, two or one, from `group` on."""
            lanes = LANES // 2 * count
            at = builder.mul(group, _number(GROUP // 2))
            by = builder.gep(vector, [builder.mul(group, _number(GROUP))])
            parts = [
                _load(builder, builder.gep(by, [_number(j * 2 * lanes)]), _I16, 2 * lanes)
                for j in range(WORD)
            ]
            two.ask(at)
            for row, scale, total in zip(two.rows, scales, two.sums, strict=True):
                words = _load(builder, builder.gep(row, [at]), _I16, 2 * lanes)
                products = _every(_I32, lanes, 0)
                for j, part in enumerate(parts):
                    shifted = builder.lshr(words, _every(_I16, 2 * lanes, 4 * j))
                    numbers = builder.and_(shifted, _every(_I16, 2 * lanes, 15))
                    products = builder.add(products, _pairs(builder, numbers, part))
                halves = _load(builder, builder.gep(scale, [group]), ir.HalfType(), count)
                each = builder.fpext(halves, _of(_FLOAT, count))
                each = _pick(builder, each, [lane // 4 for lane in range(lanes)])
                wide = builder.sitofp(products, _of(_FLOAT, lanes))
                scaled = builder.fmul(wide, each, flags=_FUSED)
                if lanes < LANES:
                    rest = _every(_FLOAT, lanes, 0.0)
                    places = ir.Constant(_of(_I32, LANES), list(range(LANES)))
                    scaled = builder.shuffle_vector(scaled, rest, places)
                builder.store(builder.fadd(builder.load(total), scaled, flags=_FUSED), total)

        odd = builder.and_(groups, _number(1))
        even = builder.sub(groups, odd)
        with cgutils.for_range_slice(builder, _number(0), even, _number(2)) as (group, _):
            add(group, 2)
        with builder.if_then(builder.trunc(odd, ir.IntType(1))):
            add(even, 1)
        return two.pair([_total(builder, builder.load(each)) for each in two.sums])

    return types.UniTuple(types.float32, 2)(items, *_Two.ARGUMENTS, x, groups), make


sums8: Any = intrinsic(_sums8)
sums4: Any = intrinsic(_sums4)


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
    width, last = x.shape[0], starts.shape[0] - 1
    rounded = np.empty(width, np.int16)
    scale = _rounded(x, rounded)
    for i in range(0, last + 1, 2):
        j, k, m = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        a, b, c, d = starts[i], starts[j], starts[k], starts[m]
        p, q = np.float32(0), np.float32(0)
        for first in range(0, width, CHUNK):
            one, other = sums8(items, a, b, c, d, rounded, first, min(CHUNK, width - first))
            p, q = p + one, q + other
        out[i], out[j] = p * (scale * scale_at(items, a)), q * (scale * scale_at(items, b))


@compiled
def dot4_at(items: Any, starts: Any, x: Any, out: Any) -> None:
    """`dot_at` of int4 rows."""
    groups, last = x.shape[0] // GROUP, starts.shape[0] - 1
    rounded, sums = np.empty((2, x.shape[0]), np.int16), np.zeros(groups, np.float32)
    scale = _rounded(x, rounded[0])
    _by_words(rounded[0], rounded[1])
    for g in range(groups):
        for k in range(GROUP):
            sums[g] += np.float32(rounded[0, g * GROUP + k])
    for i in range(0, last + 1, 2):
        j, k, m = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        a, b, c, d = starts[i], starts[j], starts[k], starts[m]
        p, q = sums4(items, a, b, c, d, rounded[1], groups)
        out[i], out[j] = (p + _least(items, a, sums)) * scale, (q + _least(items, b, sums)) * scale


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


@compiled
def _least(items: Any, start: Any, sums: Any) -> Any:
    """Of the int4 row at `start` each group's minimum times the sum of x there, added up."""
    groups = sums.shape[0]
    at = start + groups * (GROUP // 2 + 2)
    minima = items[at : at + 2 * groups].view(np.uint16)
    total = np.float32(0)
    for g in range(groups):
        total += real(minima[g]) * sums[g]
    return total


@compiled
def dot4_many_at(items: Any, starts: Any, xs: Any, begin: int, stop: int, out: Any) -> None:
    """`dot_many_at` of int4 rows: some of them for one vector after another, while they are in a
    core's cache."""
    for first in range(begin, stop, TILE_ROWS):
        end = min(first + TILE_ROWS, stop)
        for b in range(xs.shape[0]):
            dot4_at(items, starts[first:end], xs[b], out[b, first:end])


@compiled
def dot8_many_at(items: Any, starts: Any, xs: Any, begin: int, stop: int, out: Any) -> None:
    """The same of int8 rows."""
    for first in range(begin, stop, TILE_ROWS):
        end = min(first + TILE_ROWS, stop)
        for b in range(xs.shape[0]):
            dot8_at(items, starts[first:end], xs[b], out[b, first:end])
