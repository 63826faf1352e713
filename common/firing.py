"""After products with a few tokens: which neurons are named, which fire, and how strongly.

One compiled pass each. After a product a core's caches hold weights and nothing else, so that every
library that has a hand in the next lines is brought from memory again (docs/measurements.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.kernels import compiled


@compiled
def name(sums: Any, scales: Any, bias: Any) -> Any:
    """Ascending ids int32 of the neurons for which `sums` × `scales` + `bias` is above 0 in any
    row: `sums` float32 [rows, neurons], the others [neurons]."""
    rows, neurons = sums.shape
    ids, is_named = np.empty(neurons, np.int32), np.zeros(neurons, np.bool_)
    for r in range(rows):
        row = sums[r]
        for n in range(neurons):
            is_named[n] |= row[n] * scales[n] + bias[n] > 0
    named = 0
    for n in range(neurons):
        ids[named] = n
        named += is_named[n]
    return ids[:named]


@compiled
def fire(
    z: Any, few: int, bias: Any, ids: Any, slots: Any, threshold: float, squared: bool
) -> tuple[Any, Any, Any]:
    """Of `ids` and `slots` int64 [count] those of the neurons that fire for any of the first `few`
    tokens of `z`, and their activations, float32 [few, fired], 0 where one does not fire.

    `z` float32 [tokens, count], without `bias` float32 [neurons], or [0] for none. An activation is
    z, or its square, above `threshold`. What is no number fires.
    """
    count = ids.shape[0]
    added, fires = _biases_of(ids, bias), np.zeros(count, np.bool_)
    for t in range(few):  # token by token, as their products lie
        row = z[t]
        for i in range(count):
            value = row[i] + added[i]
            if value <= threshold:
                value = np.float32(0)
            elif squared:
                value *= value
            fires[i] |= value != 0
            row[i] = value
    which = np.empty(count, np.int64)
    fired = 0
    for i in range(count):
        which[fired] = i
        fired += fires[i]
    h = np.empty((few, fired), np.float32)
    their_ids, their_slots = np.empty(fired, np.int64), np.empty(fired, np.int64)
    for k in range(fired):
        their_ids[k], their_slots[k] = ids[which[k]], slots[which[k]]
    for t in range(few):
        for k in range(fired):
            h[t, k] = z[t, which[k]]
    return their_ids, their_slots, h


@compiled
def _biases_of(ids: Any, bias: Any) -> Any:
    """Of the neurons `ids`, float32 [count]; zeros without any."""
    added = np.zeros(ids.shape[0], np.float32)
    if bias.shape[0] > 0:
        for i in range(ids.shape[0]):
            added[i] = bias[ids[i]]
    return added


@compiled
def scale(h: Any, up: Any, bias: Any, ids: Any) -> None:
    """h *= `up` + the neurons' bias: `h` float32 [few, fired]; `up` [few or more, fired]."""
    added = _biases_of(ids, bias)
    for t in range(h.shape[0]):
        for k in range(h.shape[1]):
            h[t, k] *= up[t, k] + added[k]


@compiled
def within(values: Any, bound: int) -> Any:
    """Whether all are from 0 on and below `bound`."""
    outside = 0
    for value in values:  # all of them: so several are looked at at once
        outside += (value < 0) | (value >= bound)
    return outside == 0


@compiled
def starts_of(slots: Any, size: int, place: int) -> Any:
    """Where the rows begin that lie at item `place` of slots of `size` items."""
    return slots * size + place


def compile_firing() -> None:
    """Compiles what a step takes, so that no token waits for it."""
    z, none, one = np.zeros((1, 1), np.float32), np.zeros(0, np.float32), np.zeros(1, np.int64)
    ids, _, h = fire(z, 1, none, one, starts_of(one, 1, 0), 0.0, False)
    scale(h, z, none, ids)
    within(np.frombuffer(bytes(4), "<i4"), 1)
