"""How often what was read ahead was then demanded: decides how far down a prefetch is read.

Look-ahead names its neurons the surest first. Reading one for nothing costs the drive and the
processors something, and where they are free nobody waits for it. So a layer's prefetch is read as
far as two neurons of five were of use lately: on the 6.7B shape, where look-ahead names a third
more neurons than the layer does, reading them all took 1.4 times the bytes (docs/benchmarks.md).
Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES = 16  # of a prefetch's neurons, by their place in it
USEFUL_MIN = 0.4
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

    def worth(self, layer: int, count: int) -> int:
        """How many of a new prefetch's `count` neurons to read, the surest first."""
        self._prefetches[layer] += 1
        if self._prefetches[layer] % LOOK_EVERY == 0:
            return count
        useless = np.flatnonzero(self._shares[layer] < USEFUL_MIN)
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
