"""What the products' kernels write themselves instead of leaving it to LLVM: rows multiplied with
vectors, LANES numbers at a time, while the rows that come next are asked for.

Left to LLVM, a loop over numbers asks for nothing ahead: float16 rows came from memory 8 to 12 %
slower (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from common.system import first_cache_bytes

VECTORS = 4  # that a row is multiplied with at a time
ROWS = 4  # that are multiplied at a time
LANES = 8
LINE_BYTES = 64  # that memory gives at a time
FIRST, SECOND = 3, 2  # of a core's caches, as LLVM has it
# Whether a core's first cache has room for vectors and the rows that come next. Where it has not
# they drive each other out of it (docs/measurements.md: 32 KB and 48).
ROOMY = (first_cache_bytes() or 0) >= 48 << 10
NEAR = FIRST if ROOMY else SECOND

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def of(element: Any, count: int) -> Any:
    """The type of `count` elements in a register."""
    return ir.VectorType(element, count)


def every(element: Any, count: int, value: Any) -> Any:
    return ir.Constant(of(element, count), [value] * count)


def number(value: int) -> Any:
    return ir.Constant(I64, value)


def item_at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """A pointer to an item of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def width_of(context: Any, builder: Any, kind: Any, matrix: Any) -> Any:
    return builder.extract_value(context.make_array(kind)(context, builder, matrix).shape, 1)


def rows_at(
    context: Any, builder: Any, kind: Any, matrix: Any, first: Any, count: int
) -> list[Any]:
    """Pointers to `count` rows of a contiguous matrix from row `first` on."""
    width = width_of(context, builder, kind, matrix)
    places = [builder.mul(builder.add(first, number(after)), width) for after in range(count)]
    return [item_at(context, builder, kind, matrix, at) for at in places]


def load(builder: Any, pointer: Any, element: Any, count: int) -> Any:
    """`count` elements from where they lie, at any address."""
    loaded = builder.load(builder.bitcast(pointer, of(element, count).as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: Any, pointer: Any, values: Any) -> None:
    """Puts a register's elements where a pointer says, at any address."""
    kept = builder.store(values, builder.bitcast(pointer, values.type.as_pointer()))
    kept.align = 1


def spread(builder: Any, value: Any, count: int) -> Any:
    """`count` times a value in a register."""
    kind = of(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(of(I32, count), [0] * count))


def pick(builder: Any, vector: Any, chosen: Any) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(of(I32, len(chosen)), list(chosen)))


def total(builder: Any, lanes: Any) -> Any:
    """The sum of a register's float32, of which there are a power of two."""
    while (half := lanes.type.count // 2) > 0:
        both = (pick(builder, lanes, range(first, first + half)) for first in (0, half))
        lanes = builder.fadd(*both)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


def ask_for(builder: Any, pointer: Any, cache: int) -> None:
    """Has the cache line at a pointer brought as far as a cache, and goes on."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
    to_read, near, data = (ir.Constant(I32, value) for value in (0, cache, 1))
    builder.call(prefetch, [pointer, to_read, near, data])


class Rows:
    """Some rows, and as many that come after them."""

    def __init__(
        self, context: Any, builder: Any, signature: Any, given: Sequence[Any], count: int
    ) -> None:
        """`count` rows of `items` from starts[i] on: `given` begin with items, starts and i. After
        the last row comes the last again."""
        self._builder = builder
        items, starts = signature.args[:2]
        of_starts = context.make_array(starts)(context, builder, given[1])
        last = builder.sub(builder.extract_value(of_starts.shape, 0), number(1))

        def row(after: int) -> Any:
            at = self.least(builder.add(given[2], number(after)), last)
            begin = builder.load(builder.gep(of_starts.data, [at]))
            return item_at(context, builder, items, given[0], begin)

        self.rows = [row(after) for after in range(count)]
        self._next = [row(count + after) for after in range(count)]

    def least(self, one: Any, other: Any) -> Any:
        """Of two int64."""
        return self._builder.select(self._builder.icmp_signed("<", one, other), one, other)

    def ask(self, at: Any, cache: int) -> None:
        """For the line with item `at` of each row that comes next, as far as a cache."""
        for row in self._next:
            ask_for(self._builder, self._builder.gep(row, [at]), cache)

    @contextmanager
    def steps(self, end: Any, step: int, first: Any = None) -> Iterator[Any]:
        """A loop over what comes before `end`, `step` at a time: gives the first of each."""
        begin = number(0) if first is None else first
        with cgutils.for_range_slice(self._builder, begin, end, number(step)) as (at, _):
            yield at


class Several(Rows):
    """Some rows and a few vectors: what a product goes through."""

    def __init__(
        self, context: Any, builder: Any, signature: Any, given: Sequence[Any], rows: int, few: int
    ) -> None:
        """`few` of `xs` [vectors, width] from vector v on: after a `Rows`' own, `given` have xs, v
        and `made`, float32 [rows × vectors], to which is added what comes of them."""
        super().__init__(context, builder, signature, given, rows)
        vectors, _, made = signature.args[3:6]
        self._made = context.make_array(made)(context, builder, given[5]).data
        self.width = width_of(context, builder, vectors, given[3])
        self.vectors = rows_at(context, builder, vectors, given[3], given[4], few)

    def sums(self, zero: Any) -> list[list[Any]]:
        """Of each row a sum for each vector, `zero` at first."""
        builder = self._builder
        return [[cgutils.alloca_once_value(builder, zero) for _ in self.vectors] for _ in self.rows]

    def add(self, value: Callable[[int, int], Any]) -> None:
        """Adds value(row, vector) to what is in `made`."""
        builder = self._builder
        each = product(range(len(self.rows)), range(len(self.vectors)))
        for at, (row, vector) in enumerate(each):
            place = builder.gep(self._made, [number(at)])
            builder.store(builder.fadd(builder.load(place), value(row, vector)), place)
