"""Rows and tokens as whole numbers of 16 bits, each in two halves of 8, for a matrix unit.

A number is high × 256 + low; a row, or a token, has one scale. What is rounded away is 1/65,024 of
its largest number at most; float16 itself rounds each number by up to 1/2,048 of its own size.
Products of rows of up to 131,072 numbers stay within 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.integer_dot import steps_of
from common.kernels import compiled

LARGEST = 127 * 256  # so that a high half is at most 127
# Products of halves that rows of a number format and tokens need, of those that may be multiplied
# in integers: low with low may be left out, and an int8 row has one half. A float32 store's rows
# would lose too much, a bfloat16 one's resident rows are float32 (common/proof.py: what they
# promise).
PRODUCTS = {"float16": 3, "int8": 2, "int4": 3}


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
