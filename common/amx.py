"""Intel's matrix unit (AMX) as kernels use it: tiles of 16 rows, each of 64 numbers of 8 bits.

A tile of the right side has, for 64 numbers of a row, what 16 columns have to meet them with: four
of a column beside each other, 16 times. One instruction adds to 16 × 16 sums of 32 bits what two
tiles come to. There are eight registers: four of sums, and a pair for each side.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.vectors import (
    FIRST,
    FLOAT,
    I8,
    I32,
    ask_for,
    every,
    item_at,
    load,
    number,
    of,
    spread,
    store,
)

ROWS, STEP = 16, 64  # of a tile: rows, or columns, and numbers of each
TILE = ROWS * STEP
_LEFT, _RIGHT = (4, 5), (6, 7)  # registers; the first four have the sums
_ARCH_PRCTL, _ASK, _TILE_DATA = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA


@functools.cache
def usable() -> bool:
    """Whether this processor has such a unit and Linux lets this process use it: asks for that."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-int8")):
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    return int(call(_ARCH_PRCTL, _ASK, _TILE_DATA)) == 0


def _tile(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments
    )


def _register(place: int) -> Any:
    return ir.Constant(I8, place)


def _begin(_: Any) -> Any:
    """Has the registers be tiles of the largest size."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        # palette 1, from row 0 on; after 16 bytes the bytes of a row, and after 48 the rows of each
        sizes = [1, *[0] * 15, *[STEP, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8]
        sizes = ir.Constant(ir.ArrayType(I8, len(sizes)), sizes)
        place = builder.alloca(sizes.type)
        builder.store(sizes, place)
        _tile(builder, "ldtilecfg", builder.bitcast(place, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), make


def _end(_: Any) -> Any:
    """Frees them: who switches threads need not keep them."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), make


def _four(_: Any, left: Any, left_at: Any, right: Any, right_at: Any, steps: Any, sums: Any) -> Any:
    """Fills int32 `sums` with four tiles: of the pair that begins at `left_at` of `left`, with that
    at `right_at` of `right`: first with first, first with second, second with first, second with
    second."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        def item(place: int, index: Any) -> Any:
            array = context.make_array(signature.args[place])(context, builder, given[place])
            return builder.bitcast(builder.gep(array.data, [index]), I8.as_pointer())

        line = number(STEP)
        for sum_of in range(4):
            _tile(builder, "tilezero", _register(sum_of))
        with cgutils.for_range(builder, given[4]) as loop:
            at = builder.mul(loop.index, number(2 * TILE))
            for side, registers in ((0, _LEFT), (2, _RIGHT)):
                first = builder.add(given[side + 1], at)
                for register, after in zip(registers, (0, TILE), strict=True):
                    place = item(side, builder.add(first, number(after)))
                    _tile(builder, "tileloadd64", _register(register), place, line)
            for sum_of in range(4):
                one, other = _LEFT[sum_of // 2], _RIGHT[sum_of % 2]
                _tile(builder, "tdpbssd", *map(_register, (sum_of, one, other)))
        for sum_of in range(4):
            place = item(5, number(sum_of * ROWS * ROWS))
            _tile(builder, "tilestored64", _register(sum_of), place, line)
        return context.get_dummy_value()

    return types.void(left, types.int64, right, types.int64, types.int64, sums), make


def _joined(tiles: Sequence[int]) -> Any:
    """What the sums in `tiles` come to, the first of the most weight: of two, or of four, of which
    the second and the third weigh the same."""

    def make_for(
        _: Any, sums: Any, place: Any, scale: Any, scales: Any, t: Any, out: Any, at: Any
    ) -> Any:
        """For the 16 columns of the row whose sums are from `place` on of each tile: out[at:] is
        the value × scale × scales[t:]."""

        def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            def where(place: int, index: Any) -> Any:
                return item_at(context, builder, signature.args[place], given[place], index)

            def sums_of(tile: int) -> Any:
                index = builder.add(given[1], number(tile * ROWS * ROWS))
                return builder.sitofp(load(builder, where(0, index), I32, ROWS), of(FLOAT, ROWS))

            def above(high: Any, low: Any) -> Any:
                return builder.fadd(builder.fmul(high, every(FLOAT, ROWS, 256.0)), low)

            first, *middle, last = map(sums_of, tiles)
            if middle:
                first = above(first, builder.fadd(*middle))
            value = above(first, last)
            of_columns = load(builder, where(3, given[4]), FLOAT, ROWS)
            factors = builder.fmul(spread(builder, given[2], ROWS), of_columns)
            store(builder, where(5, given[6]), builder.fmul(value, factors))
            return context.get_dummy_value()

        kinds = sums, types.int64, types.float32, scales, types.int64, out, types.int64
        return types.void(*kinds), make

    return make_for


def _asked(_: Any, items: Any, at: Any) -> Any:
    """Asks memory for the line with items[at]."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        ask_for(builder, item_at(context, builder, signature.args[0], *given), FIRST)
        return context.get_dummy_value()

    return types.void(items, types.int64), make


def _copied(_: Any, items: Any, at: Any, left: Any, to: Any) -> Any:
    """Copies a step's numbers from items[at] on to left[to] on."""

    def make(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, target = (
            item_at(context, builder, signature.args[place], *given[place : place + 2])
            for place in (0, 2)
        )
        store(builder, target, load(builder, source, I8, STEP))
        return context.get_dummy_value()

    return types.void(items, types.int64, left, types.int64), make


begin_tiles: Any = intrinsic(_begin)
end_tiles: Any = intrinsic(_end)
multiply_four: Any = intrinsic(_four)
join: Any = intrinsic(_joined((0, 1)))
join_halved: Any = intrinsic(_joined((0, 1, 2, 3)))
copy: Any = intrinsic(_copied)
ask: Any = intrinsic(_asked)
