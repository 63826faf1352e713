"""Whether look-ahead pays: it hides reads of what is not cached, and costs for all that is named.

Pure. To look ahead takes the predictor a product as large as its own, and the reader a look at
every neuron; with few cores products wait for both. Where nearly all that a token needs is cached
there is next to nothing to hide: of the 6.7B shape in int8, 3 % of it not cached, a token took 1.15
times as long with look-ahead as without (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from services.compute.waits import LayerWaits

ABSENT_MIN = 1 / 20  # of the neurons that are named, those that were read for the token
RATE = 1 / 8  # of a step's share in the average


class LookAhead:
    """The setting `lookahead`, and what decides where it is auto: the share that had to be read."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._absent = 1.0

    def pays(self, whole: bool) -> bool:
        """Whether to look ahead in a step; in one of `whole` layers there is always much to
        read."""
        if self._setting != "auto":
            return self._setting == "on"
        return whole or self._absent >= ABSENT_MIN

    def learn(self, waits: Sequence[LayerWaits]) -> None:
        """The layers of a step are over, in which each request had a token."""
        named = sum(layer.hits + layer.misses for layer in waits)
        if named:
            read = sum(layer.prefetched + layer.misses for layer in waits)
            self._absent += RATE * (read / named - self._absent)
