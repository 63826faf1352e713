"""Attention of one query of each of a few sequences, as a job: scores, softmax and what they weigh
of the values, head by head, straight from the KV cache.

One compiled pass: calls of a library for each sequence took twice as long, of long ones four times
(docs/measurements.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import cfunc, types
from numba.np.numpy_support import carray

from common.jobs import TURNS, Job
from common.kernels import compiled, next_turn, real
from common.native import pointer

Floats = npt.NDArray[np.float32]

STEP = 2  # heads that a thread takes at a time
TOKENS = 4  # whose values are added at a time: so sums go through registers as much less often
LOG2_E = np.float32(math.log2(math.e))
LOG2_LEAST = np.float32(-126)  # of the smallest float32 with all its bits
# 2^f is the sum of these times f^k, off by at most 1e-8 for f from -1/2 to 1/2
# but for its rounding.
C1, C2, C3, C4, C5, C6, C7 = (
    np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 8)
)  # fmt: skip


class Held(NamedTuple):
    """Addresses of one sequence's keys and values, [kv heads, room, width] each, and how many
    tokens of the room are filled. Of the last of them the states may lie elsewhere yet, at
    `new_key` and `new_value`, [kv heads, width] each: the job puts them in their place."""

    keys: int
    values: int
    room: int
    tokens: int
    new_key: int = 0
    new_value: int = 0


def attend_job(
    queries: Floats, held: Sequence[Held], kv_heads: int, number_format: str, out: Floats
) -> Job:
    """out[i] = attention of queries[i] over what sequence i holds: `queries`, which the scores'
    scale is in, and `out` float32 [sequences, heads, width]. What a sequence comes to does not
    depend, to the bit, on those beside it."""
    numbers = np.zeros(_HELD + _FIELDS * len(held), np.int64)
    _describe(numbers, queries, kv_heads, out)
    numbers[_HELD:] = [number for each in held for number in each]
    return Job(_function(number_format), numbers, (queries, out))


# What a job's numbers are, by their places; TURNS before them, and each sequence's fields after.
_QUERIES, _OUT, _COUNT, _HEADS, _KV_HEADS, _WIDTH, _HELD = range(TURNS + 1, TURNS + 8)
_FIELDS = len(Held._fields)


@compiled
def _describe(numbers: Any, queries: Any, kv_heads: int, out: Any) -> None:
    numbers[_QUERIES], numbers[_OUT] = queries.ctypes.data, out.ctypes.data
    numbers[_COUNT], numbers[_HEADS], numbers[_WIDTH] = queries.shape
    numbers[_KV_HEADS] = kv_heads


@compiled
def weigh(scores: Any) -> Any:
    """Makes weights of scores float32 [tokens]: e to the power of each, by the largest one's. What
    to multiply them with, so that their sum is 1."""
    largest, total = scores[0], np.float32(0)
    for t in range(scores.shape[0]):
        largest = max(largest, scores[t])
    for t in range(scores.shape[0]):
        power = (scores[t] - largest) * LOG2_E
        whole = np.rint(max(power, LOG2_LEAST))
        f = power - whole
        made = f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * (C6 + f * C7))))))
        bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))  # of 2^whole
        weight = (made + np.float32(1)) * bits.view(np.float32)
        scores[t] = weight if power >= LOG2_LEAST or power != power else np.float32(0)
        total += scores[t]
    return np.float32(1) / total


@compiled
def _attend_head(query: Any, keys: Any, values: Any, scores: Any, out: Any) -> None:
    """One head's query, float32 [width], over bits [tokens × width] of keys and of values."""
    width, tokens = query.shape[0], scores.shape[0]
    for t in range(tokens):
        key, score = keys[t * width : (t + 1) * width], np.float32(0)
        for k in range(width):
            score += query[k] * real(key[k])
        scores[t] = score
    by = weigh(scores)
    out[:] = 0
    fours = tokens - tokens % TOKENS
    for t in range(0, fours, TOKENS):
        a, b, c, d = scores[t] * by, scores[t + 1] * by, scores[t + 2] * by, scores[t + 3] * by
        some = values[t * width : (t + TOKENS) * width]
        for k in range(width):
            out[k] += (
                a * real(some[k]) + b * real(some[width + k])
                + c * real(some[2 * width + k]) + d * real(some[3 * width + k])
            )  # fmt: skip
    for t in range(fours, tokens):
        a, some = scores[t] * by, values[t * width : (t + 1) * width]
        for k in range(width):
            out[k] += a * real(some[k])


@compiled
def _attend(at: int, like: Any) -> None:
    """A job's share, `like` an array of the dtype of keys and values."""
    turns, numbers = _integers(at + 8 * TURNS, 1), _integers(at, _HELD)
    count, heads, width = numbers[_COUNT], numbers[_HEADS], numbers[_WIDTH]
    kv_heads, size = numbers[_KV_HEADS], width * like.itemsize
    group = heads // kv_heads
    held = _integers(at + 8 * _HELD, count * _FIELDS).reshape(count, _FIELDS)
    queries = carray(pointer(numbers[_QUERIES]), (count, heads, width), np.float32)
    out = carray(pointer(numbers[_OUT]), (count, heads, width), np.float32)
    scores = np.empty(held[:, 3].max(), np.float32)
    first, end = next_turn(turns, STEP, count * kv_heads)
    while first < end:
        for item in range(first, end):
            i, h = item // kv_heads, item % kv_heads
            keys_at, values_at, room, tokens, new_key, new_value = held[i]
            keys = carray(pointer(keys_at + h * room * size), tokens * width, like.dtype)
            values = carray(pointer(values_at + h * room * size), tokens * width, like.dtype)
            if new_key:
                begin = (tokens - 1) * width
                keys[begin:] = carray(pointer(new_key + h * size), width, like.dtype)
                values[begin:] = carray(pointer(new_value + h * size), width, like.dtype)
            for g in range(h * group, (h + 1) * group):
                _attend_head(queries[i, g], keys, values, scores[:tokens], out[i, g])
        first, end = next_turn(turns, STEP, count * kv_heads)


@compiled
def _integers(address: int, count: int) -> Any:
    return carray(pointer(address), count, np.int64)


def _uint16(at: int) -> None:
    _attend(at, np.empty(0, np.uint16))


def _int16(at: int) -> None:
    _attend(at, np.empty(0, np.int16))


def _float32(at: int) -> None:
    _attend(at, np.empty(0, np.float32))


_FUNCTIONS = {"float16": _uint16, "bfloat16": _int16, "float32": _float32}


@functools.cache
def _function(number_format: str) -> int:
    """The address of what does jobs over such keys and values; compiled at the first."""
    made = cfunc(types.void(types.int64), cache=True)(_FUNCTIONS[number_format])
    return int(made.address or 0)


def compile_heads(number_format: str) -> None:
    """Compiles what attention takes of states of a format, so that no token waits for it."""
    one = np.zeros((1, 1, 1), np.float32)
    attend_job(one, [Held(0, 0, 0, 0)], 1, number_format, one)
