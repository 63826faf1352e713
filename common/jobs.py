"""Products as jobs: a few numbers that say what is multiplied, and a function that does it.

Any thread that has both can take its share of a product, whether or not it holds Python's lock. A
job has addresses: whoever makes one keeps the arrays until the job is over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cfunc, types
from numba.extending import overload
from numba.np.numpy_support import carray

from common.float_rows import add_range_at, dot_many_at
from common.integer_dot import dot4_at, dot8_at
from common.kernels import chosen, compiled, end_of, next_turn
from common.native import added, call, pointer, read, seen, write
from common.packed import (
    Bits,
    Floats,
    Starts,
    Vectors,
    add4_range_at,
    scales_of,
    vectors_for,
    widen_rows,
)
from common.store.geometry import GROUP

Numbers = npt.NDArray[np.int64]

_DOT, _ADD, _ADD_MANY = range(3)
_WAITED_FOR = 1 << 32  # is added to the number of helpers that are not through
LOOKS = 30_000  # 8 µs
# What a product's numbers are, by their places; TURNS, the count that threads share, is any job's.
(TURNS, _WHAT, _ITEMS, _SIZE, _STARTS, _COUNT, _STEP, _OUT, _FEW, _WIDTH, _FIRST, _SECOND,
 _THIRD, _TILES) = range(14)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """`function`: the address of what does it, given the address of `numbers`."""

    function: int
    numbers: Numbers
    kept: Sequence[npt.NDArray[Any]]  # contiguous arrays, whose addresses are among them

    def __post_init__(self) -> None:
        if not all(array.flags.c_contiguous for array in self.kept):
            raise ValueError("a job's arrays have to be contiguous")


def dot_job(items: Bits, starts: Starts, vectors: Vectors, step: int, out: Floats) -> Job:
    """out[v, i] = (the row of `items` that begins at starts[i]) · vector v, `step` rows at a time:
    rows of any number format, `vectors` by `vectors_for`. What a vector comes to does not depend,
    to the bit, on those beside it."""
    numbers = np.zeros(_TILES + 1, np.int64)
    _describe(numbers, items, starts, out, step)
    _describe_given(numbers, _DOT, *vectors)
    numbers[_WIDTH] = vectors[0].shape[1]
    return Job(_function(items.dtype.str), numbers, (items, starts, *vectors, out))


def add_job(items: Bits, starts: Starts, weights: Floats, step: int, out: Floats) -> Job:
    """out += Σ weights[i] × (the row that begins at starts[i]), `step` numbers of the width at a
    time, a multiple of GROUP. `weights` float32 [rows], `out` float32 [width]."""
    if items.dtype == np.int8:
        weights = weights * scales_of(items, starts)
    numbers = np.zeros(_TILES + 1, np.int64)
    _describe(numbers, items, starts, out[None], step)
    numbers[_WHAT], numbers[_FIRST] = _ADD, weights.ctypes.data
    return Job(_function(items.dtype.str), numbers, (items, starts, weights, out))


def add_many_job(items: Bits, starts: Starts, weights: Floats, step: int, out: Floats) -> Job:
    """The same for each of a few vectors: `weights` float32 [vectors, rows], `out` float32
    [vectors, width]. For each the result of `add_job` with the rows whose weight is not 0."""
    if items.dtype == np.int8:
        weights = weights * scales_of(items, starts)
    few = chosen(starts, np.ascontiguousarray(weights))
    numbers = np.zeros(_TILES + 1, np.int64)
    _describe(numbers, items, starts, out, step)
    _describe_given(numbers, _ADD_MANY, *few)
    numbers[_TILES] = few[2].shape[1]
    return Job(_function(items.dtype.str), numbers, (items, starts, *few, out))


@compiled
def _describe(numbers: Any, items: Any, starts: Any, out: Any, step: int) -> None:
    numbers[_ITEMS], numbers[_SIZE] = items.ctypes.data, items.shape[0]
    numbers[_STARTS], numbers[_COUNT] = starts.ctypes.data, starts.shape[0]
    numbers[_OUT], numbers[_STEP] = out.ctypes.data, step
    numbers[_FEW], numbers[_WIDTH] = out.shape


@compiled
def _describe_given(numbers: Any, what: int, first: Any, second: Any, third: Any) -> None:
    numbers[_WHAT], numbers[_FIRST] = what, first.ctypes.data
    numbers[_SECOND], numbers[_THIRD] = second.ctypes.data, third.ctypes.data


@compiled
def _numbers_of(at: int) -> Any:
    return carray(pointer(at), _TILES + 1, np.int64)


@compiled
def _turns_of(at: int) -> Any:
    """The count that threads share."""
    return carray(pointer(at + 8 * TURNS), 1, np.int64)


@compiled
def _starts_of(numbers: Any) -> Any:
    return carray(pointer(numbers[_STARTS]), numbers[_COUNT], np.int64)


@compiled
def _floats(address: int, rows: int, width: int) -> Any:
    return carray(pointer(address), (rows, width), np.float32)


@compiled
def _integers(address: int, rows: int, width: int) -> Any:
    return carray(pointer(address), (rows, width), np.int64)


@compiled
def _items_of(numbers: Any, dtype: Any) -> Any:
    return carray(pointer(numbers[_ITEMS]), numbers[_SIZE], dtype)


@compiled
def _dot(at: int, numbers: Any, items: Any) -> None:
    """A dot product of rows of floats."""
    few, count = numbers[_FEW], numbers[_COUNT]
    starts, xs = _starts_of(numbers), _floats(numbers[_FIRST], few, numbers[_WIDTH])
    out, turns = _floats(numbers[_OUT], few, count), _turns_of(at)
    first, end = next_turn(turns, numbers[_STEP], count)
    while first < end:
        dot_many_at(items, starts, xs, first, end, out)
        first, end = next_turn(turns, numbers[_STEP], count)


def _add_range(
    items: Any, starts: Any, weights: Any, count: int, width: int, first: int, out: Any
) -> None:
    """Of the two kernels that which takes such items."""
    raise NotImplementedError  # numba takes what is below


@overload(_add_range, strict=False)  # its names, with their types, are those of the others
def _which_adds(
    items: Any, starts: Any, weights: Any, count: Any, width: Any, first: Any, out: Any
) -> Callable[..., None]:
    if items.dtype == types.uint8:
        return lambda items, starts, weights, count, width, first, out: add4_range_at(
            items, starts, weights, count, width, first, out
        )
    return lambda items, starts, weights, count, width, first, out: add_range_at(
        items, starts, weights, count, width, first, out
    )


@compiled
def _add(at: int, numbers: Any, items: Any) -> None:
    """A sum of rows, for one vector or for each of a few."""
    few, count, width = numbers[_FEW], numbers[_COUNT], numbers[_WIDTH]
    starts, turns = _starts_of(numbers), _turns_of(at)
    weights, out = _floats(numbers[_FIRST], 1, count)[0], _floats(numbers[_OUT], few, width)
    places, values = _integers(numbers[_FIRST], few, count), _floats(numbers[_SECOND], few, count)
    ends = _integers(numbers[_THIRD], few, numbers[_TILES])
    first, end = next_turn(turns, numbers[_STEP], width)
    while first < end:
        if numbers[_WHAT] == _ADD:
            _add_range(items, starts, weights, count, width, first, out[0, first:end])
        else:
            _add_many(items, places, values, ends, width, first, end, out)
        first, end = next_turn(turns, numbers[_STEP], width)


@compiled
def _add_many(
    items: Any,
    places: Any,
    values: Any,
    ends: Any,
    width: int,
    first: int,
    end: int,
    out: Any,
) -> None:
    """For each vector b, out[b] += Σ its weights × its rows, by what `chosen` found of them, from
    number `first` to `end`: to the bit what is added for that vector alone."""
    done = np.zeros(len(places), np.int64)
    for tile in range(ends.shape[1]):
        for b in range(len(places)):
            stop, rest = end_of(ends[b], done[b], tile), slice(done[b], ends[b, -1])
            _add_range(
                items, places[b, rest], values[b, rest], stop - done[b], width, first,
                out[b, first:end],
            )  # fmt: skip
            done[b] = stop


def _uint16(at: int) -> None:
    numbers = _numbers_of(at)
    _floats_job(at, numbers, _items_of(numbers, np.uint16))


def _int16(at: int) -> None:
    numbers = _numbers_of(at)
    _floats_job(at, numbers, _items_of(numbers, np.int16))


def _float32(at: int) -> None:
    numbers = _numbers_of(at)
    _floats_job(at, numbers, _items_of(numbers, np.float32))


@compiled
def _floats_job(at: int, numbers: Any, items: Any) -> None:
    if numbers[_WHAT] == _DOT:
        _dot(at, numbers, items)
    else:
        _add(at, numbers, items)


@compiled
def _rounded_of(numbers: Any) -> Any:
    """The rounded vectors of a dot product of packed rows, and their scales."""
    few = numbers[_FEW]
    vectors = carray(pointer(numbers[_FIRST]), (few, numbers[_WIDTH]), np.int16)
    return vectors, _floats(numbers[_SECOND], 1, few)[0]


def _int8(at: int) -> None:
    numbers = _numbers_of(at)
    items, count = _items_of(numbers, np.int8), numbers[_COUNT]
    if numbers[_WHAT] != _DOT:
        _add(at, numbers, items)
        return
    starts, turns = _starts_of(numbers), _turns_of(at)
    out, (vectors, scales) = _floats(numbers[_OUT], numbers[_FEW], count), _rounded_of(numbers)
    first, end = next_turn(turns, numbers[_STEP], count)
    while first < end:
        dot8_at(items, starts, vectors, scales, first, end, out)
        first, end = next_turn(turns, numbers[_STEP], count)


def _uint8(at: int) -> None:
    """int4 rows."""
    numbers = _numbers_of(at)
    items, few, count = _items_of(numbers, np.uint8), numbers[_FEW], numbers[_COUNT]
    if numbers[_WHAT] != _DOT:
        _add(at, numbers, items)
        return
    starts, turns = _starts_of(numbers), _turns_of(at)
    out, (vectors, scales) = _floats(numbers[_OUT], few, count), _rounded_of(numbers)
    sums = _floats(numbers[_THIRD], few, numbers[_WIDTH] // GROUP)
    first, end = next_turn(turns, numbers[_STEP], count)
    while first < end:
        dot4_at(items, starts, vectors, scales, sums, first, end, out)
        first, end = next_turn(turns, numbers[_STEP], count)


_FUNCTIONS = {np.dtype(each.__name__[1:]).str: each
              for each in (_uint16, _int16, _float32, _int8, _uint8)}  # fmt: skip


@functools.cache
def _function(dtype: str) -> int:
    """The address of what does jobs over such items; compiled at the first."""
    made = cfunc(types.void(types.int64), cache=True)(_FUNCTIONS[dtype])
    return int(made.address or 0)


@compiled
def perform(jobs: Any) -> None:
    """Does jobs, `jobs` int64 [jobs, 2]: each the address of a function and of numbers."""
    for i in range(jobs.shape[0]):
        call(jobs[i, 0], jobs[i, 1])


@compiled
def help_with(jobs: Any, woken: int, over: int) -> None:
    """Does `jobs`, int64 [1 + room, 2], again and again: whenever there is a byte in the pipe
    `woken`. jobs[0] are how many there are, from jobs[1] on, and how many helpers are not through;
    the last of them puts a byte into `over` if it is waited for. Returns at a number of jobs below
    0, a byte taken, or when the pipe is closed."""
    byte, left = np.zeros(1, np.int8), jobs.ctypes.data + 8
    while True:
        got = read(woken, byte.ctypes.data, 1)
        if got == 0 or jobs[0, 0] < 0:
            return
        if got == 1:
            perform(jobs[1 : 1 + jobs[0, 0]])
            if added(left, -1) == _WAITED_FOR + 1:
                write(over, byte.ctypes.data, 1)


@compiled
def lead(jobs: Any, wake: int, over: int, helpers: int) -> None:
    """The same once, with `helpers` threads that `help_with` them, for which `wake` and `over` are
    the other ends of their pipes; returns when all are through. It looks for that before it sleeps:
    a thread that slept goes on with cold caches."""
    bytes_, left = np.zeros(helpers, np.int8), jobs.ctypes.data + 8
    jobs[0, 1] = helpers
    write(wake, bytes_.ctypes.data, helpers)
    perform(jobs[1 : 1 + jobs[0, 0]])
    for _ in range(LOOKS):
        if seen(left) == 0:
            return
    if added(left, _WAITED_FOR) > 0:
        while read(over, bytes_.ctypes.data, 1) != 1:  # a signal came
            pass


def compile_jobs(dtype: npt.DTypeLike) -> None:
    """Compiles what a server takes of rows of a dtype of BITS, so that no token waits for it."""
    items, starts = np.zeros(2 * GROUP, dtype), np.zeros(1, np.int64)
    wide, one = np.zeros((1, GROUP), np.float32), np.zeros((1, 1), np.float32)
    jobs = [
        dot_job(items, starts, vectors_for(items, wide), GROUP, one.copy()),
        add_job(items, starts, one[0], GROUP, wide[0]),
        add_many_job(items, starts, one, GROUP, wide.copy()),
    ]
    perform(listed(jobs)[1:])
    widen_rows(items, starts, GROUP, 0, wide)


def listed(jobs: Sequence[Job]) -> Numbers:
    """Jobs as `lead` and `help_with` take them; they are to be kept as long."""
    given = [(len(jobs), 0), *((job.function, job.numbers.ctypes.data) for job in jobs)]
    return np.array(given, np.int64)
