"""The fetches under way: what is a hit, what is read next into which slots, what compute is told.

Pure: messages in, messages and groups of reads out; no socket, clock or file. One fetch of a layer:

    Fetch ──▶ hits, pinned: Resident part 0
         └──▶ misses: a group takes slots ──▶ is read ──▶ Resident part 1, 2, ... ──▶ Release
                        ▲                                                               │
                        └──────── no slot to be had: the rest waits ◀───────────────────┘

So a layer streams through whatever slots it has. A group is at most half of them, so that the next
lands while one is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.limits import (
    FETCHES_MAX,
    LINK_MESSAGES_MAX,
    PART_BUNDLES_MIN,
    PART_BYTES_MAX,
    PARTS_IN_FLIGHT_MAX,
    STEPS_KEPT,
)
from common.messages import Fetch, Resident, Unreadable
from common.store.geometry import Geometry
from services.reader.cache import Ids, LayerCache
from services.reader.evict import Slots
from services.reader.reads import Reads, plan_reads


class BadFetchError(ValueError):
    """A Fetch that makes no sense; the text says why."""


@dataclass
class Progress:
    """How far one Fetch is."""

    fetch: Fetch
    taken_ns: int
    todo: Ids  # ascending; neither sent nor in a group
    left: int  # neurons not sent
    group_size: int = 0  # neurons of one group, at most
    in_flight: int = 0  # groups
    next_part: int = 0
    parts: dict[int, Slots] = field(default_factory=dict)  # sent and not released
    over: bool = False  # dropped or failed: nothing more is sent

    @property
    def done(self) -> bool:
        return not self.parts and (self.over or self.left == 0)


@dataclass(frozen=True)
class Group:
    """Misses of one fetch that are read together and sent as one part. Its slots are pinned."""

    tag: int
    layer: int
    ids: Ids
    slots: Slots  # of the layer
    reads: Reads  # into slots of the whole cache
    progress: Progress


class Fetches:
    """All fetches and the caches of all layers. `release`, `drop`, `land` and `fail` make room:
    ask for `groups` after them, and after `take`."""

    def __init__(self, geometry: Geometry, slots: Sequence[int], window: int | None) -> None:
        """`slots` per layer, at least one each; `window` in tokens, None for all that room has."""
        self.caches = [LayerCache(geometry.neurons, count, window) for count in slots]
        self.first_slot = [sum(slots[:layer]) for layer in range(len(slots))]
        self.hits = self.misses = self.unknown_releases = self.late_fetches = 0
        self._geometry = geometry
        self._now = 0
        self._steps: dict[int, None] = {}  # the latest, oldest first
        self._dropped: dict[int, None] = {}  # the latest, oldest first
        self._fetches: dict[tuple[int, int], Progress] = {}
        self._groups: dict[int, Group] = {}
        self._tag = 0

    def take(self, fetch: Fetch, now_ns: int) -> list[Resident]:
        """Takes a Fetch up: answers its hits. `BadFetchError` if it makes no sense."""
        ids = self._check(fetch)
        if fetch.step in self._dropped:  # its Drop came by the shorter way
            self.late_fetches += 1
            return []
        self._tick(fetch.step)
        self.caches[fetch.layer].expire(self._now)
        progress = Progress(fetch, now_ns, ids, len(ids))
        self._fetches[fetch.step, fetch.layer] = progress
        answers = self._hits(progress, now_ns)
        if not len(ids):
            answers = [self._part(progress, ids, ids, None, now_ns)]
        self.hits += len(ids) - progress.left
        self.misses += progress.left
        progress.next_part = 1  # part 0 is the hits, also where there are none
        progress.group_size = self._group_size(fetch.layer, progress.left)
        return answers

    def groups(self, now_ns: int) -> Iterator[Group | Resident]:
        """What can go on now: groups to read, and parts that another fetch has brought by now."""
        for progress in self._fetches.values():
            if len(progress.todo):
                yield from self._hits(progress, now_ns)
            while len(progress.todo) and progress.in_flight < PARTS_IN_FLIGHT_MAX:
                group = self._next_group(progress)
                if group is None:
                    break
                yield group

    def land(self, tag: int, now_ns: int) -> list[Resident]:
        """All reads of a group are over and right."""
        group = self._groups.pop(tag)
        cache, progress = self.caches[group.layer], group.progress
        cache.land(group.slots)
        progress.in_flight -= 1
        if progress.over:
            cache.unpin(group.slots)
            return []
        return [self._part(progress, group.ids, group.slots, group.reads, now_ns)]

    def fail(self, tag: int, bad: Ids, reason: str) -> list[Unreadable]:
        """A group's reads are over, but what came of its neurons `bad` is wrong."""
        group = self._groups.pop(tag)
        cache, progress = self.caches[group.layer], group.progress
        wrong = np.isin(group.ids, bad)
        cache.fail(group.slots[wrong])
        cache.land(group.slots[~wrong])
        cache.unpin(group.slots[~wrong])
        progress.in_flight -= 1
        if progress.over:
            return []
        self._end(progress)
        fetch = progress.fetch
        return [Unreadable(fetch.request, fetch.step, fetch.layer, reason)]

    def release(self, step: int, layer: int, part: int) -> None:
        """Compute is done with a part. One that is not known is counted."""
        progress = self._fetches.get((step, layer))
        slots = progress.parts.pop(part, None) if progress else None
        if progress is None or slots is None:
            self.unknown_releases += 1
            return
        self.caches[layer].unpin(slots)
        self._forget_if_done(progress)

    def drop(self, step: int) -> None:
        """Forgets a step's fetches. Groups that are being read land as plain residents."""
        _remember(self._dropped, step, LINK_MESSAGES_MAX)
        for progress in [p for (s, _), p in self._fetches.items() if s == step]:
            for slots in progress.parts.values():
                self.caches[progress.fetch.layer].unpin(slots)
            progress.parts.clear()
            self._end(progress)

    def group(self, tag: int) -> Group:
        """The group that is read under `tag`."""
        return self._groups[tag]

    def _check(self, fetch: Fetch) -> Ids:
        neurons = self._geometry.neurons
        if not 0 <= fetch.layer < len(self.caches):
            raise BadFetchError(f"layer {fetch.layer} of {len(self.caches)}")
        if len(fetch.ids) % 4 or len(fetch.ids) > 4 * neurons:
            raise BadFetchError(f"{len(fetch.ids)} bytes of ids")
        ids = np.frombuffer(fetch.ids, "<i4")
        if len(ids) and not (ids[0] >= 0 and ids[-1] < neurons and (ids[1:] > ids[:-1]).all()):
            raise BadFetchError(f"ids do not ascend within {neurons} neurons")
        if (fetch.step, fetch.layer) in self._fetches:
            raise BadFetchError(f"layer {fetch.layer} of step {fetch.step} is under way")
        if len(self._fetches) >= FETCHES_MAX:
            raise BadFetchError(f"{FETCHES_MAX} fetches are under way (limit FETCHES_MAX)")
        return ids

    def _tick(self, step: int) -> None:
        """Our clock: how many steps there were. A step's number is not: it may skip."""
        if step not in self._steps:
            self._now += 1
            _remember(self._steps, step, STEPS_KEPT)

    def _group_size(self, layer: int, misses: int) -> int:
        """Few enough parts to be worth their messages, enough of them to multiply meanwhile."""
        size = max(-(-misses // PARTS_IN_FLIGHT_MAX), PART_BUNDLES_MIN)
        largest = PART_BYTES_MAX // self._geometry.stride_bytes
        return max(1, min(size, largest, self.caches[layer].slots // 2))

    def _hits(self, progress: Progress, now_ns: int) -> list[Resident]:
        """Sends what is resident of what is to do, if anything is."""
        cache = self.caches[progress.fetch.layer]
        resident, _ = cache.find(progress.todo)
        if not resident.any():
            return []
        ids = progress.todo[resident]
        progress.todo = progress.todo[~resident]
        return [self._part(progress, ids, cache.pin(ids, self._now), None, now_ns)]

    def _next_group(self, progress: Progress) -> Group | None:
        """The next misses of a fetch with slots for them; None if there is nothing to be had now:
        no slot, or another fetch is loading the rest."""
        layer = progress.fetch.layer
        cache = self.caches[layer]
        _, absent = cache.find(progress.todo)
        places = np.flatnonzero(absent)[: progress.group_size]
        count = min(len(places), cache.room())
        # Too small a group costs more than it brings, and what is held will be released.
        if count == 0 or count < min(len(places), PART_BUNDLES_MIN):
            return None
        ids = progress.todo[places[:count]]
        progress.todo = np.delete(progress.todo, places[:count])
        slots = cache.claim(ids, self._now)
        reads = plan_reads(ids, slots + self.first_slot[layer], self._geometry.stride_bytes)
        self._tag += 1
        group = Group(self._tag, layer, ids, slots, reads, progress)
        self._groups[group.tag] = group
        progress.in_flight += 1
        return group

    def _part(
        self, progress: Progress, ids: Ids, slots: Slots, reads: Reads | None, now_ns: int
    ) -> Resident:
        part = progress.next_part
        progress.next_part += 1
        progress.left -= len(ids)
        progress.parts[part] = slots
        fetch = progress.fetch
        return Resident(
            request=fetch.request,
            step=fetch.step,
            layer=fetch.layer,
            part=part,
            left=progress.left,
            reads=len(reads) if reads else 0,
            bytes_read=len(ids) * self._geometry.stride_bytes if reads else 0,
            named_ns=fetch.named_ns,
            taken_ns=progress.taken_ns,
            landed_ns=now_ns,
            ids=ids.tobytes(),
            slots=(slots + self.first_slot[fetch.layer]).astype("<i4").tobytes(),
        )

    def _end(self, progress: Progress) -> None:
        progress.over = True
        progress.todo = progress.todo[:0]
        self._forget_if_done(progress)

    def _forget_if_done(self, progress: Progress) -> None:
        if progress.done:
            del self._fetches[progress.fetch.step, progress.fetch.layer]


def _remember(latest: dict[int, None], step: int, count_max: int) -> None:
    """Adds `step` to the `latest` steps, of which only `count_max` are kept."""
    latest[step] = None
    if len(latest) > count_max:
        del latest[next(iter(latest))]
