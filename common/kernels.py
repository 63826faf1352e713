"""Products of rows with a vector, straight from the numbers as they lie in memory.

Each number becomes float32 in a register and is added up there; nothing is gathered, converted or
copied first. On a processor without float16 arithmetic, torch's own ways of multiplying rows took
1.4 to 2.8 times as long (docs/measurements.md).

Numbers are named by a numpy dtype that holds their bits, for numpy and numba know no bfloat16, and
numba's arithmetic no float16:

    float16   uint16          bfloat16   int16          float32   float32          int8   int8

Compiled for this processor by numba at their first use, which takes seconds, and kept on disk for
the next process. They hold no lock of Python's while they run.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

from common.system import first_cache_bytes

BITS: dict[str, npt.DTypeLike] = {
    "float16": np.uint16,
    "bfloat16": np.int16,
    "float32": np.float32,
    "int8": np.int8,
    "int4": np.uint8,  # two in a byte: common/packed.py
}

TILE_ROWS = 32  # rows that are taken for one vector after another while they are in a core's cache

_CACHED = (
    "kernels", "vectors", "float_rows", "integer_dot", "halves", "packed", "native", "jobs",
    "fired", "firing", "amx", "tiles", "rounded", "tall", "heads",
)  # fmt: skip


def _keep_apart() -> None:
    """Has compiled kernels kept by what all of these files say: numba compiles one again when its
    own file changes, and not when another does whose functions are in it."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in _CACHED))
    digest.update(f"{first_cache_bytes()}".encode())  # by which vectors.py chooses
    numba: Any = config
    base = Path(numba.CACHE_DIR or here / "__pycache__")
    numba.CACHE_DIR = str(base / f"kernels-{digest.hexdigest()[:16]}")


_keep_apart()

# Sums may be taken in any order. That there are no NaNs is not promised: they must come through.
compiled = njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
in_order = njit(cache=True, nogil=True)  # products are taken, too, as they are written


def widened(builder: Any, value: Any, bits: Any, lanes: int = 0) -> Any:
    """The number that `bits` stand for, as float32, or `lanes` of them in a register."""

    def kind(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes else element

    single = kind(ir.FloatType())
    if bits == types.uint16:
        return builder.fpext(builder.bitcast(value, kind(ir.HalfType())), single)
    if bits == types.int16:  # the upper half of a float32
        word = kind(ir.IntType(32))
        shift = ir.Constant(word, [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(builder.zext(value, word), shift), single)
    if bits == types.int8:
        return builder.sitofp(value, single)
    return value


def _real(_: Any, bits: Any) -> Any:
    """The number that `bits` stand for, as float32."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0], bits)

    return types.float32(bits), make


def _taken(_: Any, turns: Any, step: Any) -> Any:
    """The first of the next `step` items, by a count that threads share, int64 [1]."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", count, arguments[1], "monotonic")

    return types.int64(turns, types.int64), make


real: Any = intrinsic(_real)
taken: Any = intrinsic(_taken)


@functools.lru_cache(maxsize=64)
def row_starts(rows: int, width: int) -> npt.NDArray[np.int64]:
    """Where the rows of a contiguous matrix begin; one array for all matrices of a shape."""
    return np.arange(rows, dtype=np.int64) * width


@compiled
def one_after_another(starts: Any, first: int, end: int, size: int) -> Any:
    """Whether rows of `size` items lie so, from that at starts[first] on: then they come from
    memory as one stream, and fewer at a time are faster."""
    elsewhere = 0
    for i in range(first + 1, end):  # all of them: so several are looked at at once
        elsewhere += starts[i] - starts[i - 1] != size
    return elsewhere == 0


@compiled
def next_turn(turns: Any, step: int, count: int) -> Any:
    """From which to which of `count` items this thread does next, none if all are taken. `turns`
    int64 [1], 0 at first, is shared by the threads that do them, `step` items at a time."""
    first = min(taken(turns, step), count)
    return first, min(first + step, count)


@compiled
def chosen(starts: Any, weights: Any) -> Any:
    """Of each vector the rows whose weight is not 0, in order: where they begin and their weights,
    [vectors, rows], filled from the front; and how many are among the first rows up to and with
    each tile's last, [vectors, tiles]. `weights` float32 [vectors, rows]."""
    vectors, count = weights.shape
    tiles = -(-count // TILE_ROWS)
    places, values = np.empty((vectors, count), np.int64), np.empty((vectors, count), np.float32)
    ends = np.zeros((vectors, tiles), np.int64)
    for b in range(vectors):
        found = 0
        for i in range(count):
            if weights[b, i] != 0:
                places[b, found], values[b, found] = starts[i], weights[b, i]
                found += 1
            ends[b, i // TILE_ROWS] = found
    return places, values, ends


@compiled
def end_of(ends: Any, done: int, tile: int) -> Any:
    """How far a vector's rows go in a tile: in whole fours, as `add_at` takes them, but for the
    last tile."""
    end = ends[tile]
    return end if tile == len(ends) - 1 else end - (end - done) % 4


@compiled
def widen_at(items: Any, starts: Any, out: Any) -> None:
    """out[i] = the row of `items` that begins at starts[i], as float32: `out` [rows, width]."""
    width = out.shape[1]
    for i in range(starts.shape[0]):
        row, to = items[starts[i] : starts[i] + width], out[i]
        for k in range(width):
            to[k] = real(row[k])
