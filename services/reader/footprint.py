"""The cache's size in memory: follows what pressure.py decides, slot by slot.

Slots that are out of use give their pages back to the system; before they are used again the
pages are allocated, so that a machine without memory is an answer here and no SIGBUS later.
"""

from __future__ import annotations

from pathlib import Path

from common.plan import Plan
from common.segment import Region, give_back, take_again
from services.reader.fetches import Fetches
from services.reader.pressure import Pressure


class Footprint:
    """Shrinks and grows the cache of `fetches`, whose bytes are `region`, the file at `path`."""

    def __init__(self, fetches: Fetches, plan: Plan, region: Region, path: Path) -> None:
        self._fetches = fetches
        self._region = region
        self._path = path
        self._stride_bytes = plan.cache_bytes // sum(plan.slots)
        self._pressure = Pressure(plan.cache_bytes, plan.cache_bytes_min)

    def fit(self, now_s: float) -> tuple[int, int] | None:
        """Slots in use before and after, if memory asked for a change and there was one."""
        if not self._pressure.due(now_s):  # first: the loop asks in every turn
            return None
        before = self._slots()
        target = self._pressure.look(now_s, before * self._stride_bytes)
        if target is None:
            return None
        change = self._fetches.resize(target // self._stride_bytes)
        if len(change.restored) and not take_again(self._path, change.restored, self._stride_bytes):
            change = self._fetches.resize(before)  # memory is short after all
        give_back(self._region, change.withdrawn, self._stride_bytes)
        after = self._slots()
        return None if after == before else (before, after)

    def _slots(self) -> int:
        return sum(pool.usable for pool in self._fetches.each_pool())
