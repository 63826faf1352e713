"""How often what was read ahead was then demanded: decides how far down a prefetch is read.

Look-ahead names its neurons the surest first. A neuron that is not read ahead though it is needed
costs the read's time, unhidden. One that is read for nothing costs the same only where the drive
had something better to do. So with a drive that is busy for a share b of the time, a neuron is
worth reading if it is needed with a probability p of p > b (1 - p), or p > b ÷ (1 + b): one of two
for a drive that never rests, and any for one that has nothing to do. Reading all that is named took
1.4 times the bytes on the 6.7B shape (docs/benchmarks.md); what it does to a small model's late
neurons is in docs/measurements.md. Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES = 16  # of a prefetch's neurons, by their place in it
RATE = 1 / 16  # of a class's newest share in its average
FEW = 8  # neurons of a class that count as a whole look at it
LOOK_EVERY = (
    8  # prefetches of a layer: one of so many is read to its end, or nothing would be known
)


class Usefulness:
    """Per layer and class: the share of what was read that was demanded."""

    def __init__(self, layers: int) -> None:
        self._shares = np.ones((layers, CLASSES))
        self._prefetches = np.zeros(layers, np.int64)

    def worth(self, layer: int, count: int, busy: float) -> int:
        """How many of a new prefetch's `count` neurons to read, the surest first, with a drive that
        is busy for this share of the time."""
        self._prefetches[layer] += 1
        if self._prefetches[layer] % LOOK_EVERY == 0:
            return count
        useless = np.flatnonzero(self._shares[layer] < busy / (1 + busy))
        classes = int(useless[0]) if len(useless) else CLASSES
        return -(-count * classes // CLASSES)

    def learn(
        self,
        layer: int,
        places: npt.NDArray[np.integer],
        count: int,
        demanded: npt.NDArray[np.bool_],
    ) -> None:
        """Of a prefetch of `count` neurons those at `places` were read, and `demanded` or not."""
        classes = places * CLASSES // count
        read = np.bincount(classes, minlength=CLASSES)
        used = np.bincount(classes, weights=demanded, minlength=CLASSES)
        seen = read > 0
        rate = RATE * np.minimum(read[seen] / FEW, 1)
        self._shares[layer, seen] += rate * (used[seen] / read[seen] - self._shares[layer, seen])
