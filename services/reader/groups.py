"""Groups of reads: neurons of one fetch that are read together. Pure: it begins none itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import SettingError
from common.limits import ALIGN_BYTES
from common.messages import Fetch
from common.policy import Slots
from common.store.geometry import Geometry
from services.reader.cache import Ids
from services.reader.reads import Reads, plan_reads


@dataclass(frozen=True)
class Group:
    """Absent neurons of one fetch, on their way into slots that the group pins."""

    tag: int
    fetch: Fetch
    ids: Ids
    slots: Slots  # of the whole cache, in the ids' order
    reads: Reads

    @property
    def layer(self) -> int:
        return self.fetch.layer

    @property
    def bytes_read(self) -> int:
        return len(self.reads.slots) * self.reads.stride_bytes

    def neuron(self, read: int) -> int:
        """The first neuron of a read."""
        return int(self.ids[self.reads.firsts[read] % len(self.ids)])


class Groups:
    """Makes groups, and knows by tag those that are being read."""

    def __init__(self, geometry: Geometry, bundling: str = "on") -> None:
        """`bundling` is the setting; `SettingError` if these bundles cannot be read apart."""
        self._stride_bytes = geometry.stride_bytes
        # With bundling off, a bundle is as many reads as it has parts, as if they lay apart.
        self._pieces = len(geometry.parts) if bundling == "off" else 1
        if geometry.stride_bytes % (self._pieces * ALIGN_BYTES):
            raise SettingError(
                f"INFLASH_BUNDLING: off, but a part of a bundle has not a multiple of"
                f" {ALIGN_BYTES:,} bytes ({geometry.stride_bytes:,} in {self._pieces}), so that it"
                " cannot be read by itself"
            )
        self._groups: dict[int, Group] = {}
        self._tag = 0

    def plan(self, fetch: Fetch, ids: Ids, slots: Slots, size: int) -> list[Group]:
        """New groups, of at most `size`, that bring `ids`, in the order of need, into the claimed
        `slots`."""
        planned = []
        for first in range(0, len(ids), size):
            order = np.argsort(ids[first : first + size], kind="stable") + first
            reads = self._reads(ids[order], slots[order])
            self._tag += 1
            planned.append(Group(self._tag, fetch, ids[order], slots[order], reads))
        return planned

    def _reads(self, ids: Ids, slots: Slots) -> Reads:
        """The reads of bundles; or of all their first pieces, then of all their second ones: the
        kernel would merge two neighbours that it is given together."""
        count, size = self._pieces, self._stride_bytes // self._pieces
        plans = [plan_reads(ids * count + i, slots * count + i, size) for i in range(count)]
        if count == 1:
            return plans[0]
        offsets = np.concatenate([plan.offsets for plan in plans])
        pieces = np.concatenate([plan.slots for plan in plans])
        return Reads(offsets, np.arange(len(offsets) + 1), pieces, size)

    def begin(self, group: Group) -> None:
        """A group's reads begin."""
        self._groups[group.tag] = group

    def end(self, tag: int) -> Group:
        return self._groups.pop(tag)

    def get(self, tag: int) -> Group:
        return self._groups[tag]

    def read_into(self, layers: range) -> bool:
        """Whether a group of one of these layers is being read."""
        return any(group.layer in layers for group in self._groups.values())
