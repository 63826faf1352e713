"""Products of packed rows with a vector, in integers.

The vector is rounded to int16, by its largest value, and a product of two integers is an integer:
processors multiply 8 or 16 pairs and add neighbours in one instruction. In float32 each number of a
row is converted first: where that is slower than memory is, int8 rows take as long as float16 ones,
and int4 rows longer (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels import VECTORS, compiled, real
from common.store.geometry import GROUP, SCALED

LARGEST = 32767  # of the rounded vector
SIZE = np.uint32(0x7FFFFFFF)  # of a float32's bits, all but its sign
INFINITE = np.uint32(0x7F800000)
LARGEST_FLOAT = np.finfo(np.float32).max
LANES = 8
PAIRS = 2 * LANES  # numbers that one instruction multiplies, adding neighbours
CHUNK = 4096  # numbers of an int8 row whose products add up within int32: 512 × 128 × 32767 a lane
WORD = 4  # numbers of an int4 row in 16 bits
WORDS = GROUP // WORD

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()


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
    """Two rows of `items`, the two that come after them, and for each of `count` vectors two sums;
    what the kernels have in common. While two rows are multiplied the next two are asked for:
    without it int8 rows came from memory at two thirds of this speed, and int4 rows at half
    (docs/measurements.md)."""

    ARGUMENTS = (types.int64,) * 4  # where the rows begin: two, and the next two

    def __init__(self, context: Any, builder: Any, items: Any, given: Any, count: int, zero: Any):
        """`items` the array's type, `given` the array and the ARGUMENTS, `zero` of the sums."""
        self._context, self._builder = context, builder
        self.rows = [_pointer(context, builder, items, given[0], at) for at in given[1:3]]
        self._next = [_pointer(context, builder, items, given[0], at) for at in given[3:5]]
        self.sums = [
            [cgutils.alloca_once_value(builder, zero) for _ in range(count)] for _ in self.rows
        ]

    def ask(self, at: Any) -> None:
        """For byte `at` of the next two."""
        for row in self._next:
            _ask_for(self._builder, self._builder.gep(row, [at]))

    def totals(self, wide: Callable[[Any], Any]) -> Any:
        """float32 [rows × vectors], of each sum made float32 by `wide`."""
        found = [
            _total(self._builder, wide(self._builder.load(each)))
            for sums in self.sums
            for each in sums
        ]
        kind = types.UniTuple(types.float32, len(found))
        return self._context.make_tuple(self._builder, kind, found)


def _vectors(context: Any, builder: Any, kind: Any, xs: Any, first: Any, count: int) -> list[Any]:
    """To `count` vectors of `xs` [vectors, width], from `first` on."""
    width = builder.extract_value(context.make_array(kind)(context, builder, xs).shape, 1)
    places = [builder.add(first, _number(i)) for i in range(count)]
    return [_pointer(context, builder, kind, xs, builder.mul(at, width)) for at in places]


def _sums8(count: int) -> Any:
    def make_for(
        _: Any, items: Any, a: Any, b: Any, c: Any, d: Any, xs: Any, v: Any, first: Any, size: Any
    ) -> Any:
        """Of the int8 rows at `a` and `b` the numbers from `first` on, `size`, a multiple of PAIRS
        and at most CHUNK, times those of `count` of `xs`, int16, from vector `v` on: float32,
        those of `a` first. The rows at `c` and `d` come next."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            two = _Two(context, builder, items, given, count, _every(_I32, LANES, 0))
            xs, v, first, size = given[5:]
            vectors = _vectors(context, builder, signature.args[5], xs, v, count)
            end = builder.add(first, size)
            with cgutils.for_range_slice(builder, first, end, _number(PAIRS)) as (at, _):
                two.ask(at)
                numbers = [_load(builder, builder.gep(row, [at]), _I8, PAIRS) for row in two.rows]
                for i, vector in enumerate(vectors):
                    by = _load(builder, builder.gep(vector, [at]), _I16, PAIRS)
                    for some, sums in zip(numbers, two.sums, strict=True):
                        added = builder.add(builder.load(sums[i]), _pairs(builder, some, by))
                        builder.store(added, sums[i])
            return two.totals(lambda lanes: builder.sitofp(lanes, _of(_FLOAT, LANES)))

        given = (items, *_Two.ARGUMENTS, xs, types.int64, types.int64, types.int64)
        return types.UniTuple(types.float32, 2 * count)(*given), make

    return make_for


def _sums4(count: int) -> Any:
    def make_for(
        _: Any, items: Any, a: Any, b: Any, c: Any, d: Any, xs: Any, v: Any, groups: Any
    ) -> Any:
        """The numbers of the int4 rows at `a` and `b`, each times its group's scale, times `count`
        of `xs`, int16 by words (`_by_words`), from vector `v` on: float32, those of `a` first. The
        rows at `c` and `d` come next.

        Two groups' numbers lie in PAIRS words. A shift and a mask make int16 of them that are
        multiplied as they are; a group's products are the half of the lanes that takes its
        scale."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            two = _Two(context, builder, items, given, count, _every(_FLOAT, LANES, 0.0))
            xs, v, groups = given[5:]
            vectors = _vectors(context, builder, signature.args[5], xs, v, count)
            _add_groups(builder, two, vectors, groups)
            return two.totals(lambda lanes: lanes)

        given = (items, *_Two.ARGUMENTS, xs, types.int64, types.int64)
        return types.UniTuple(types.float32, 2 * count)(*given), make

    return make_for


def _add_groups(builder: Any, two: _Two, vectors: list[Any], groups: Any) -> None:
    """To the sums of `two` those of all groups: two at a time, and one that is left."""
    ends = builder.mul(groups, _number(GROUP // 2))
    half = ir.HalfType()
    scales = [builder.bitcast(builder.gep(row, [ends]), half.as_pointer()) for row in two.rows]

    def add(group: Any, count: int) -> None:
        lanes = LANES // 2 * count
        at = builder.mul(group, _number(GROUP // 2))
        two.ask(at)
        for row, scale, sums in zip(two.rows, scales, two.sums, strict=True):
            words = _load(builder, builder.gep(row, [at]), _I16, 2 * lanes)
            shifted = [builder.lshr(words, _every(_I16, 2 * lanes, 4 * j)) for j in range(WORD)]
            numbers = [builder.and_(each, _every(_I16, 2 * lanes, 15)) for each in shifted]
            halves = _load(builder, builder.gep(scale, [group]), half, count)
            each = builder.fpext(halves, _of(_FLOAT, count))
            each = _pick(builder, each, [lane // 4 for lane in range(lanes)])
            for vector, total in zip(vectors, sums, strict=True):
                by = builder.gep(vector, [builder.mul(group, _number(GROUP))])
                products = _every(_I32, lanes, 0)
                for j, some in enumerate(numbers):
                    part = _load(
                        builder, builder.gep(by, [_number(j * 2 * lanes)]), _I16, 2 * lanes
                    )
                    products = builder.add(products, _pairs(builder, some, part))
                scaled = builder.fmul(builder.sitofp(products, _of(_FLOAT, lanes)), each)
                if lanes < LANES:
                    places = ir.Constant(_of(_I32, LANES), list(range(LANES)))
                    rest = _every(_FLOAT, lanes, 0.0)
                    scaled = builder.shuffle_vector(scaled, rest, places)
                builder.store(builder.fadd(builder.load(total), scaled), total)

    odd = builder.and_(groups, _number(1))
    even = builder.sub(groups, odd)
    with cgutils.for_range_slice(builder, _number(0), even, _number(2)) as (group, _):
        add(group, 2)
    with builder.if_then(builder.trunc(odd, ir.IntType(1))):
        add(even, 1)


_one8: Any = intrinsic(_sums8(1))
_four8: Any = intrinsic(_sums8(VECTORS))
_one4: Any = intrinsic(_sums4(1))
_four4: Any = intrinsic(_sums4(VECTORS))


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
def dot8_at(
    items: Any, starts: Any, numbers: Any, scales: Any, first: int, end: int, out: Any
) -> None:
    """For i from `first` to `end`, out[v, i] = (the int8 row that begins at starts[i]) · vector v,
    rounded by `round8`. To the same bits whatever vectors and rows are beside it."""
    vectors, width = numbers.shape
    fours, last = vectors - vectors % VECTORS, starts.shape[0] - 1
    for i in range(first, end, 2):
        j, k, m = min(i + 1, end - 1), min(i + 2, last), min(i + 3, last)
        a, b, c, d = starts[i], starts[j], starts[k], starts[m]
        of_a, of_b = scale_at(items, a), scale_at(items, b)
        for v in range(0, fours, VECTORS):
            p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            t, u, w, x = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for at in range(0, width, CHUNK):
                size = min(CHUNK, width - at)
                made = _four8(items, a, b, c, d, numbers, v, at, size)
                p, q, r, s = p + made[0], q + made[1], r + made[2], s + made[3]
                t, u, w, x = t + made[4], u + made[5], w + made[6], x + made[7]
            for n, of_row_a, of_row_b in ((0, p, t), (1, q, u), (2, r, w), (3, s, x)):
                out[v + n, i] = of_row_a * (scales[v + n] * of_a)
                out[v + n, j] = of_row_b * (scales[v + n] * of_b)
        for v in range(fours, vectors):
            p, t = np.float32(0), np.float32(0)
            for at in range(0, width, CHUNK):
                made = _one8(items, a, b, c, d, numbers, v, at, min(CHUNK, width - at))
                p, t = p + made[0], t + made[1]
            out[v, i], out[v, j] = p * (scales[v] * of_a), t * (scales[v] * of_b)


@compiled
def dot4_at(
    items: Any, starts: Any, numbers: Any, scales: Any, sums: Any, first: int, end: int, out: Any
) -> None:
    """The same of int4 rows, and of vectors rounded by `round4`."""
    vectors, groups = sums.shape
    fours, last = vectors - vectors % VECTORS, starts.shape[0] - 1
    for i in range(first, end, 2):
        j, k, m = min(i + 1, end - 1), min(i + 2, last), min(i + 3, last)
        a, b, c, d = starts[i], starts[j], starts[k], starts[m]
        for v in range(0, fours, VECTORS):
            made = _four4(items, a, b, c, d, numbers, v, groups)
            for n in range(VECTORS):
                out[v + n, i], out[v + n, j] = made[n], made[VECTORS + n]
        for v in range(fours, vectors):
            made_one = _one4(items, a, b, c, d, numbers, v, groups)
            out[v, i], out[v, j] = made_one[0], made_one[1]
        for v in range(vectors):
            out[v, i] = (out[v, i] + _least(items, a, sums[v])) * scales[v]
            if j != i:
                out[v, j] = (out[v, j] + _least(items, b, sums[v])) * scales[v]


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
