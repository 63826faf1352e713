"""Rows and tokens as whole numbers of 16 bits, each in two halves of 8, for products in integers.

A number is high × 256 + low; a row, or a token, has one scale. What is rounded away is 1/65,024 of
its largest number at most; float16 itself rounds each number by up to 1/2,048 of its own size.
Products of rows of up to 131,072 numbers stay within 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.integer_dot import steps_of
from common.kernels import compiled
from common.packed import widen_range_at

LARGEST = 127 * 256  # so that a high half is at most 127
# Products of halves that rows of a number format and tokens take, of those that may be so
# multiplied: low with low is left out, and an int8 row has one half (it goes to torch no more: by
# this, what a product of torch's would take is reckoned). A float32 store's rows
# would lose too much, a bfloat16 one's resident rows are float32 (common/proof.py: what they
# promise).
PRODUCTS = {"float16": 3, "int8": 2, "int4": 3}


@compiled
def halve_tokens(rows: Any, first: int, halves: Any, scales: Any) -> None:
    """Of some tokens, `rows` float32 [some, width], token `first` and those after it, the halves
    and scales: int8 [2 × tokens, width], the high ones first, and float32 [tokens]."""
    tokens = scales.shape[0]
    for i in range(rows.shape[0]):
        t = first + i
        scales[t] = halve_at(rows[i], halves[t], halves[tokens + t])


@compiled
def halve_rows(items: Any, starts: Any, high: Any, low: Any, scales: Any) -> None:
    """The halves and scales of the rows, of floats or int4, that begin at `starts`: int8 [rows,
    width] each, and float32 [rows]."""
    width = high.shape[1]
    wide = np.empty((1, width), np.float32)  # of one row: it stays in a core's nearest cache
    for i in range(starts.shape[0]):
        widen_range_at(items, starts[i : i + 1], width, 0, wide)
        scales[i] = halve_at(wide[0], high[i], low[i])


@compiled
def halve_at(x: Any, high: Any, low: Any) -> Any:
    """Fills int8 `high` and `low` with the halves of float32 `x`, and returns its scale."""
    scale, inverse = steps_of(x, LARGEST)
    if inverse == 0:  # a product of 0 and NaN would be no number
        high[:] = 0
        low[:] = 0
        return scale
    for k in range(x.shape[0]):
        number = np.int32(np.rint(x[k] * inverse))
        high[k] = np.int8((number + np.int32(128)) >> np.int32(8))
        low[k] = np.int8(number)  # its lowest 8 bits: what high × 256 leaves
    return scale


@compiled
def join(both: Any, of_low: Any, row_scales: Any, scales: Any, out: Any) -> None:
    """Fills `out` float32 [rows, tokens] with what the products of halves come to.

    `both` int32 [rows, 2 × tokens]: of a row's high half with each token's halves; `of_low` int32
    [rows, tokens], of its low half with each token's high one.
    """
    tokens = out.shape[1]
    for i in range(out.shape[0]):
        scale = row_scales[i] * np.float32(256)
        for t in range(tokens):
            rest = np.float32(both[i, tokens + t]) + np.float32(of_low[i, t])
            value = np.float32(both[i, t]) * np.float32(256) + rest
            out[i, t] = value * (scale * scales[t])
