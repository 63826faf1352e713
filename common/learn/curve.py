"""What a threshold costs: how many neurons it names, and how many of those that fire. Pure.

A curve counts a layer's scores over held-out tokens on a grid of thresholds. Thresholds of all
layers are chosen together: where a neuron more in one layer finds as much as in any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEP = 1 / 64  # of the grid, in score units: standard deviations of a neuron's error
REACH = 16.0  # the grid goes from -REACH to REACH
GRID = np.arange(-REACH, REACH, STEP, dtype=np.float32)
LAYER_RECALL_MIN = 0.9  # no layer is given up for the sake of the others

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """Counts above each threshold of GRID, and in all."""

    named: Counts  # neurons with a score above it
    hits: Counts  # of those, the ones that fired
    active: int  # neurons that fired
    silent: int  # neurons that did not

    def __add__(self, other: Curve) -> Curve:
        return Curve(
            self.named + other.named,
            self.hits + other.hits,
            self.active + other.active,
            self.silent + other.silent,
        )

    def at_recall(self, recall: float) -> int:
        """The highest threshold (its place in GRID) that finds this share of what fires."""
        return max(int(np.count_nonzero(self.hits >= recall * self.active)) - 1, 0)

    def named_per_active(self, place: int) -> float:
        return float(self.named[place]) / max(self.active, 1)

    def recall(self, place: int) -> float:
        return float(self.hits[place]) / self.active if self.active else 1.0

    def false_positives(self, place: int) -> float:
        """Share of the silent neurons that are named."""
        return float(self.named[place] - self.hits[place]) / max(self.silent, 1)


def curve_of(scores: npt.NDArray[np.float32], fired: npt.NDArray[np.bool_]) -> Curve:
    """The curve of scores [tokens, neurons] and of what fired."""
    # Place p of the grid is below a score if p <= cell: the score's cell counts for 0..cell.
    cell = np.clip(np.ceil((scores + REACH) / STEP).astype(np.int32) - 1, -1, len(GRID) - 1)
    return Curve(_above(cell.ravel()), _above(cell[fired]), int(fired.sum()), int((~fired).sum()))


def _above(cells: npt.NDArray[np.int32]) -> Counts:
    counts = np.bincount(cells + 1, minlength=len(GRID) + 1)
    return counts[::-1].cumsum()[::-1][1:].astype(np.int64)


def choose_thresholds(curves: Sequence[Curve], recall: float) -> list[int]:
    """Places in GRID, one per layer: the fewest neurons named for this recall of all layers.

    The price of a hit, in neurons named, is the same in every layer (a Lagrange multiplier, found
    by bisection); recall counts all layers' neurons together.
    """
    active = sum(curve.active for curve in curves)
    low, high = 0.0, 1e6
    for _ in range(100):
        price = (low + high) / 2
        hits = sum(int(c.hits[_cheapest(c, price)]) for c in curves)
        low, high = (price, high) if hits < recall * active else (low, price)
    return [_cheapest(curve, high) for curve in curves]


def _cheapest(curve: Curve, price: float) -> int:
    best = int(np.argmin(curve.named - price * curve.hits))
    return min(best, curve.at_recall(LAYER_RECALL_MIN))
