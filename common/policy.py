"""Cache policies: who leaves when room is needed. Pure functions of numbers, shared by the reader,
which evicts, and by `scripts/policies.py`, which replays a recorded trace through each of them.

A policy keeps one number per neuron, its key: the neuron with the lowest key leaves first. A use
changes a key and time does not, so that nothing has to be updated for neurons that are not used.

    window   key = the token in which the neuron was last used; below the window it leaves at once
    decay    key = log2 of the use count that halves every HALF_LIFE tokens, as of token 0

Tokens are counted from 1 in steps of the model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.float64]
Slots = npt.NDArray[np.int64]

NEVER_USED = -math.inf  # the key of a neuron that no token has used
HALF_LIFE = 16.0  # tokens; 8 to 32 read within 4 % of each other (docs/measurements.md)


class Policy(Protocol):
    def used(self, keys: Keys, now: int) -> Keys:
        """New keys of neurons that had `keys` and are used in token `now`."""

    def floor(self, now: int) -> float:
        """A neuron whose key is below this has left the window at token `now`."""


@dataclass(frozen=True)
class Window:
    """The paper's window (section 3.1): a neuron stays for `tokens` tokens after its last use; with
    0 it is gone when the next token begins.

    None: as large as fits, the longest unused leaves when room is needed.
    """

    tokens: int | None

    def used(self, keys: Keys, now: int) -> Keys:
        return np.full(len(keys), float(now))

    def floor(self, now: int) -> float:
        return NEVER_USED if self.tokens is None else float(now - self.tokens)


@dataclass(frozen=True)
class Decay:
    """A soft window: each use counts half as much after `half_life` tokens.

    count(now) = 2 ** (key - now / half_life), so keys compare as the counts do, at any time.
    """

    half_life: float = HALF_LIFE

    def used(self, keys: Keys, now: int) -> Keys:
        mark = now / self.half_life
        # Not logaddexp2, which takes three times as long (docs/measurements.md).
        return np.log2(np.exp2(keys - mark) + 1) + mark

    def floor(self, now: int) -> float:
        return NEVER_USED


def make_policy(name: str, window: int | None) -> Policy:
    """The policy of the settings `policy` (auto, decay, window) and `window`."""
    if name == "decay" or (name == "auto" and window is None):
        return Decay()
    return Window(window)


def evict(keys: Keys, held: npt.NDArray[np.bool_], floor: float, want: int) -> Slots:
    """The slots to give up: those that left the window, and more if `want` asks for more.

    `keys` [slots] are the keys of the neurons in them. `held` [slots] marks what must stay: slots
    that are pinned, being loaded, or free. Of the others, every one with a key below `floor`
    leaves, then those with the lowest keys, until `want` slots are given up or none is left.
    Returns int64 [given up], in no order.
    """
    order = np.where(held, math.inf, keys)
    outside = 0 if floor == NEVER_USED else int(np.count_nonzero(order < floor))
    # The lowest keys are both those below the floor and the next to go: one cut does both.
    count = min(max(want, outside), len(held) - int(np.count_nonzero(held)))
    if count == 0:
        return np.empty(0, np.int64)
    return np.argpartition(order, count - 1)[:count]


def slots_by_use(asked: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """`total` slots for layers that are asked for so many neurons a token, in proportion: at least
    `least` each and at most `most`; `total` allows for that.

    By highest averages: one after another goes to the layer with the most neurons asked per slot.
    """
    slots = [least] * len(asked)
    heap = [(-count / (least + 1), layer) for layer, count in enumerate(asked) if most > least]
    heapq.heapify(heap)
    for _ in range(total - least * len(asked)):
        layer = heap[0][1]
        slots[layer] += 1
        if slots[layer] == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-asked[layer] / (slots[layer] + 1), layer))
    return slots
