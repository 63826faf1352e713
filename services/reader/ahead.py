"""Look-ahead: neurons that a layer will probably need, read and protected before it asks.

Pure. One prefetch of a layer:

    Fetch ──▶ what is resident: pinned, so that it stays
         └──▶ what is absent: claims slots, some groups at once; they wait, and are read, the
                  │           surest neurons first, where no demand has anything to read
                  ▼
    the layer's demand, or its step is over: what is not begun is dropped, the pins are given up;
    what is on its way is sent to the layer if it waits for it, and else nobody holds it

The demand finds it as hits, but for what was there by the end of the layer before: that is sent
already (fetches.py). It claims slots that nobody holds, and marks no use. In a pool of all layers
it leaves a share of the slots to the demands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.limits import (
    FETCHES_MAX,
    PART_BYTES_MAX,
    PREFETCH_BUNDLES_MAX,
    PREFETCH_GROUPS_IN_FLIGHT_MAX,
    PREFETCH_GROUPS_WAITING_MAX,
)
from common.messages import Fetch
from common.policy import Slots
from common.store.geometry import Geometry
from services.reader.cache import Ids, Pool, among
from services.reader.groups import Group, Groups
from services.reader.useful import Usefulness

DEMAND_SHARE = 4  # of a pool of all layers, one slot in so many is never a prefetch's


@dataclass
class Ahead:
    """How far one prefetch is."""

    fetch: Fetch
    named: Ids  # the surest first
    todo: Ids  # in the same order; neither protected nor in a group
    protected: list[Slots] = field(default_factory=list)
    waiting: deque[Group] = field(default_factory=deque)  # with slots, not begun
    groups: list[Group] = field(default_factory=list)  # begun, over or not
    over: bool = False  # its layer's demand has come, or its step is over
    read: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # known when it is over
    wasted: int = 0  # of `read`, what that demand did not name


class Lookahead:
    """All prefetches under way."""

    def __init__(self, geometry: Geometry, pools: Sequence[Pool], groups: Groups) -> None:
        """`pools` by layer; `groups` are shared with the demands."""
        self.prefetched = 0  # neurons that were read
        self.wasted = 0  # of them, those that the demand of that layer and step did not name
        self.dropped = 0  # neurons that were named and not read in time
        self.unreadable = 0  # groups that came wrong
        self._neurons = geometry.neurons
        self._pools = pools
        self._groups = groups
        self._group_size = max(
            1, min(PREFETCH_BUNDLES_MAX, PART_BYTES_MAX // geometry.stride_bytes)
        )
        self._useful = Usefulness(geometry.layers)
        self._aheads: dict[tuple[int, int], Ahead] = {}
        self._in_flight: dict[int, Ahead] = {}  # by the tag of the group

    def full(self) -> bool:
        return len(self._aheads) >= FETCHES_MAX

    def knows(self, step: int, layer: int) -> bool:
        return (step, layer) in self._aheads

    def find(self, step: int, layer: int) -> Ahead | None:
        """A layer's prefetch, unless it is of the whole layer: that streams, and nothing of it may
        hold slots before it is asked for."""
        ahead = self._aheads.get((step, layer))
        return None if ahead is None or is_whole(ahead.fetch, self._neurons) else ahead

    def take(self, fetch: Fetch, ids: Ids, busy: float) -> None:
        """Takes a prefetch of `ids` up: protects what is resident; of the rest is to be read what
        is worth it with a drive that is busy for the share `busy` of the time."""
        ahead = self._aheads[fetch.step, fetch.layer] = Ahead(fetch, ids, ids)
        self._protect(ahead)
        if is_whole(ahead.fetch, self._neurons):
            return
        worth = ids[: self._useful.worth(fetch.layer, len(ids), busy)]
        ahead.todo = ahead.todo[among(ahead.todo, worth, self._neurons)]

    def groups(self) -> Iterator[Group]:
        """What can be read ahead now. Few groups are in flight, so that a demand that comes finds
        the drive free soon."""
        for ahead in self._aheads.values():
            while len(self._in_flight) < PREFETCH_GROUPS_IN_FLIGHT_MAX:
                if not ahead.waiting and not self._plan(ahead):
                    break
                group = ahead.waiting.popleft()
                self._groups.begin(group)
                ahead.groups.append(group)
                self._in_flight[group.tag] = ahead
                self.prefetched += len(group.ids)
                yield group

    def land(self, group: Group) -> None:
        """A group has landed."""
        self._finish(group, group.slots)

    def fail(self, group: Group, good: Slots) -> None:
        """A group's reads are over, and only what is in its slots `good` came right. If the others
        are needed, the demand reads them itself, and reports it."""
        self.unreadable += 1
        self._finish(group, good)

    def pass_by(self, step: int, layer: int, demanded: Ids) -> Ahead | None:
        """A layer's demand is there: its prefetch ends and is returned, and so do those of the
        layers before it and of all other steps."""
        found = None
        for key, ahead in list(self._aheads.items()):
            if key == (step, layer):
                self._learn(ahead, self._end(ahead, demanded))
                found = ahead
            elif key[0] != step or key[1] < layer:
                self._end(ahead, demanded[:0])
        return found

    def drop(self, step: int) -> None:
        """Ends a step's prefetches."""
        for (its_step, _), ahead in list(self._aheads.items()):
            if its_step == step:
                self._end(ahead, ahead.named[:0])

    def give_up(self, pool: Pool) -> None:
        """Protects nothing in a pool any more: a demand has no slot, and none would come free."""
        for ahead in self._aheads.values():
            if self._pools[ahead.fetch.layer] is pool:
                self._let_go(ahead)

    def _protect(self, ahead: Ahead) -> npt.NDArray[np.bool_]:
        """Pins what is resident of what is to do; a mask over the rest: what is absent."""
        layer = ahead.fetch.layer
        pool = self._pools[layer]
        resident, absent = pool.find(layer, ahead.todo)
        if resident.any():
            ids = ahead.todo[resident]
            new = ~pool.held(layer, ids)  # the others cost no slot
            ids = ids[~new | (np.cumsum(new) <= self._allowance(pool))]
            ahead.protected.append(pool.pin(layer, ids))
            ahead.todo, absent = ahead.todo[~resident], absent[~resident]
        return absent

    def _plan(self, ahead: Ahead) -> bool:
        """Claims slots for what is absent, in one eviction for some groups, and makes those groups,
        which wait; whether there are any."""
        if not len(ahead.todo):
            return False
        absent = self._protect(ahead)  # other fetches may have brought some by now
        layer = ahead.fetch.layer
        pool = self._pools[layer]
        count = min(PREFETCH_GROUPS_WAITING_MAX * self._group_size, self._allowance(pool))
        places = np.flatnonzero(absent)[:count]
        if not len(places):
            return False
        ids = ahead.todo[places]
        ahead.todo = np.delete(ahead.todo, places)
        slots = pool.claim(layer, ids, is_whole(ahead.fetch, self._neurons))
        ahead.waiting.extend(self._groups.plan(ahead.fetch, ids, slots, self._group_size))
        return True

    def _allowance(self, pool: Pool) -> int:
        """Slots that prefetches may still pin in a pool. In a layer's own pool the layer's demand
        ends its prefetch; a pool of all layers has other demands to serve."""
        left = -(-pool.usable // DEMAND_SHARE) if len(pool.layers) > 1 else 0
        return max(0, pool.room() - left)

    def _finish(self, group: Group, slots: Slots) -> None:
        ahead = self._in_flight.pop(group.tag)
        if ahead.over:
            self._pools[group.layer].unpin(slots)
        else:
            ahead.protected.append(slots)

    def _end(self, ahead: Ahead, demanded: Ids) -> npt.NDArray[np.bool_]:
        """Ends it; its layer's demand named `demanded`, none if that never came. Returns a mask
        over what was read for it: what was demanded."""
        ahead.over = True
        if ahead.groups:
            ahead.read = np.concatenate([group.ids for group in ahead.groups])
        used = among(ahead.read, demanded, self._neurons)
        ahead.wasted = len(used) - int(np.count_nonzero(used))
        self.wasted += ahead.wasted
        self._let_go(ahead)
        del self._aheads[ahead.fetch.step, ahead.fetch.layer]
        return used

    def _learn(self, ahead: Ahead, used: npt.NDArray[np.bool_]) -> None:
        """Of what was read `used` was demanded."""
        if not len(used) or is_whole(ahead.fetch, self._neurons):
            return
        place = np.empty(self._neurons, np.int64)
        place[ahead.named] = np.arange(len(ahead.named))
        self._useful.learn(ahead.fetch.layer, place[ahead.read], len(ahead.named), used)

    def _let_go(self, ahead: Ahead) -> None:
        pool = self._pools[ahead.fetch.layer]
        self.dropped += len(ahead.todo) + sum(len(group.ids) for group in ahead.waiting)
        ahead.todo = ahead.todo[:0]
        for group in ahead.waiting:
            pool.fail(group.slots)
        ahead.waiting.clear()
        if ahead.protected:
            pool.unpin(np.concatenate(ahead.protected))
        ahead.protected.clear()


def is_whole(fetch: Fetch, neurons: int) -> bool:
    """Whether it asks for a whole layer of so many neurons: that streams, and of its look-ahead
    there is nothing to learn, it will be needed."""
    return len(fetch.ids) == 4 * neurons
