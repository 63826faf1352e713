"""Verifies bundles: each one's checksum, when it is first read in this process's life.

Flash goes bad in place, rarely; a check of every read would cost each token what it is worth once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from common.policy import Slots
from common.store.checksum import bundle_checksum
from services.reader.backends import Memory
from services.reader.cache import Ids


class Verifier:
    """Remembers which bundles were found right."""

    def __init__(
        self, checksums: Callable[[int], npt.NDArray[np.uint64]], layers: int, memory: Memory
    ) -> None:
        """`checksums(layer)` are the store's, uint64 [neurons]."""
        self._checksums = checksums
        self._memory = memory
        self._expected: list[npt.NDArray[np.uint64] | None] = [None] * layers
        self._right: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)] * layers
        self.bundles = 0  # verified so far

    def wrong(self, layer: int, ids: Ids, slots: Slots) -> Ids:
        """Those of `ids` whose bytes, in `slots` of the whole cache, are not what was stored."""
        expected = self._expected[layer]
        if expected is None:
            expected = self._expected[layer] = self._checksums(layer)
            self._right[layer] = np.zeros(len(expected), np.bool_)
        right = self._right[layer]
        new = np.flatnonzero(~right[ids])
        if not len(new):
            return ids[:0]
        memory = self._memory
        found = [bundle_checksum(memory[slot]) for slot in slots[new].tolist()]
        new_ids = ids[new]
        matches = np.array(found, np.uint64) == expected[new_ids]
        right[new_ids[matches]] = True
        self.bundles += len(new)
        return new_ids[~matches]
