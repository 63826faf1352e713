"""Groups of reads: neurons of one fetch that are read together. Pure: it begins none itself."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Fetch
from common.policy import Slots
from services.reader.cache import Ids
from services.reader.reads import Reads, plan_reads


@dataclass(frozen=True)
class Group:
    """Absent neurons of one fetch, on their way into slots that the group pins."""

    tag: int
    fetch: Fetch
    ids: Ids
    reads: Reads

    @property
    def layer(self) -> int:
        return self.fetch.layer

    @property
    def slots(self) -> Slots:
        """Of the whole cache, in the ids' order."""
        return self.reads.slots

    @property
    def bytes_read(self) -> int:
        return len(self.ids) * self.reads.stride_bytes


class Groups:
    """Makes groups, and knows by tag those that are being read."""

    def __init__(self, stride_bytes: int) -> None:
        self._stride_bytes = stride_bytes
        self._groups: dict[int, Group] = {}
        self._tag = 0

    def plan(self, fetch: Fetch, ids: Ids, slots: Slots, size: int) -> list[Group]:
        """New groups, of at most `size`, that bring `ids`, ascending, into the claimed `slots`."""
        planned = []
        for first in range(0, len(ids), size):
            part = slice(first, first + size)
            reads = plan_reads(ids[part], slots[part], self._stride_bytes)
            self._tag += 1
            planned.append(Group(self._tag, fetch, ids[part], reads))
        return planned

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
