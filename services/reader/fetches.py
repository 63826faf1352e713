"""The fetches under way: what is a hit, what is read next into which slots, what compute is told.

Pure: messages in, messages and groups of reads out; no socket, clock or file. One demand of a layer
(a prefetch goes its own way: ahead.py):

    Fetch ──▶ hits, pinned: Resident
         └──▶ misses: a group takes slots ──▶ is read ──▶ Resident, Resident, ... ──▶ Release
                        ▲                                                               │
                        └──────── no slot to be had: the rest waits ◀───────────────────┘

What look-ahead has found or brought for a layer by the time the layer before is over is sent then,
as a part of its own: compute multiplies it while the predictor names the layer's neurons.

So a layer streams through whatever slots it has. A group is at most half of them, so that the next
lands while one is multiplied; and where a whole layer is asked for, its hits go in several parts,
so that the first slots come back soon. Demands go before prefetches: nothing is read ahead while a
demand has anything left to read, and a demand that nobody's release can help takes the slots that
prefetches protect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from common.plan import SLOTS_MIN, parts_of
from common.policy import Policy
from common.store.geometry import Geometry
from services.reader.ahead import Ahead, Lookahead, is_whole
from services.reader.cache import Ids, Pool, Resize, among, make_pools, resize
from services.reader.groups import Group, Groups
from services.reader.progress import NOTHING, Brought, Progress


class BadFetchError(ValueError):
    """A Fetch that makes no sense; the text says why."""


class Fetches:
    """All fetches and the index of the cache. `release`, `drop`, `land`, `fail` and `resize` make
    room: ask for `groups` after them, and after `take`. What they return goes to compute."""

    def __init__(
        self,
        geometry: Geometry,
        slots: Sequence[int],
        policy: Policy,
        scope: str,
        extras: str,
        bundling: str = "on",
    ) -> None:
        """`slots` per layer, at least one each; `scope` (layer, global), `extras` (none, ahead,
        resident) and `bundling` (on, off) are the settings `slots`, `extras`, `bundling`."""
        self.pools = make_pools(geometry.neurons, slots, policy, scope)  # by layer
        self.hits = self.misses = 0
        self.unknown_releases = self.late_fetches = self.late_prefetches = 0
        self._geometry = geometry
        self._bundles_max = max(1, PART_BYTES_MAX // geometry.stride_bytes)  # of a streamed part
        self._extras = extras
        self._now = 0
        self._newest = -1  # the step that began last
        self._steps: dict[int, int] = {}  # the latest, oldest first: the last layer demanded, or -1
        self._dropped: dict[int, int] = {}  # the latest, oldest first
        self._fetches: dict[tuple[int, int], Progress] = {}
        self._groups = Groups(geometry, bundling)
        self._read_for: dict[int, Progress] = {}  # by the tag of a demand's group
        self._over = (-1, -1)  # the step and layer with which compute was done last
        self._used: tuple[int, Ids] | None = None  # of the last answer, not marked so yet
        self.ahead = Lookahead(geometry, self.pools, self._groups)

    def each_pool(self) -> list[Pool]:
        """The pools, each once."""
        return list(dict.fromkeys(self.pools))

    def resize(self, slots: int) -> Resize:
        """Brings the slots in use toward `slots`, over all layers; see cache.resize."""
        self._mark_used()
        return resize(self.each_pool(), slots, min(SLOTS_MIN, self._geometry.neurons))

    def take(self, fetch: Fetch, now_ns: int, busy: float = 1.0) -> list[Resident]:
        """Takes a Fetch up: answers a demand's hits. `BadFetchError` if it makes no sense.

        The busier the drive (`busy`, the share of the time), the surer a prefetch has to be."""
        self._mark_used()
        ids = self._check(fetch)
        if fetch.prefetch:
            if self._is_late(fetch):
                self.late_prefetches += 1
            else:
                self._begin(fetch, -1)
                self.ahead.take(fetch, ids, busy)
                if fetch.layer == 0 or self._over == (fetch.step, fetch.layer - 1):
                    return self._early(fetch.step, fetch.layer, now_ns)
            return []
        if fetch.step in self._dropped:  # its Drop came by the shorter way
            self.late_fetches += 1
            return []
        self._begin(fetch, fetch.layer)
        return self._answer(fetch, ids, now_ns)

    def groups(self) -> Iterator[Group]:
        """The groups that can be read now."""
        self._mark_used()
        for progress in self._fetches.values():
            if len(progress.todo) and progress.in_flight < PARTS_IN_FLIGHT_MAX:
                yield from self._next_groups(progress)
        if not any(len(progress.todo) for progress in self._fetches.values()):
            yield from self.ahead.groups()

    def land(self, tag: int, now_ns: int) -> list[Resident]:
        """All reads of a group are over and right: for its own fetch, or for others that waited
        for the same neurons."""
        group = self._groups.end(tag)
        pool = self.pools[group.layer]
        pool.land(group.slots)
        others = self._to_waiting(group.layer, now_ns)  # first: with its last pin it may be gone
        if group.fetch.prefetch:
            self.ahead.land(group)
            return others
        progress = self._read_for.pop(tag)
        progress.in_flight -= 1
        if progress.over:
            pool.unpin(group.slots)
            return others
        brought = Brought(reads=len(group.reads), bytes_read=group.bytes_read)
        return [progress.part(group.ids, group.slots, brought, now_ns), *others]

    def fail(self, tag: int, bad: Ids, reason: str, now_ns: int) -> list[Resident | Unreadable]:
        """A group's reads are over, but what came of its neurons `bad` is wrong. The others may be
        what another fetch waits for."""
        group = self._groups.end(tag)
        pool, wrong = self.pools[group.layer], np.isin(group.ids, bad)
        good = group.slots[~wrong]
        pool.fail(group.slots[wrong])
        pool.land(good)
        failed = list[Resident | Unreadable]()
        if not group.fetch.prefetch:
            progress = self._read_for.pop(tag)
            progress.in_flight -= 1
            if not progress.over:
                self._end(progress)
                fetch = progress.fetch
                failed.append(Unreadable(fetch.request, fetch.step, fetch.layer, reason))
        others = self._to_waiting(group.layer, now_ns)  # first: with its last pin it may be gone
        if group.fetch.prefetch:
            self.ahead.fail(group, good)
        else:
            pool.unpin(good)
        return [*failed, *others]

    def release(self, step: int, layer: int, part: int, now_ns: int) -> list[Resident]:
        """Compute is done with a part; with a layer's last the next one begins. One that is not
        known is counted."""
        progress = self._fetches.get((step, layer))
        slots = progress.parts.pop(part, None) if progress else None
        if progress is None or slots is None:
            self.unknown_releases += 1
            return []
        self.pools[layer].unpin(slots)
        if not self._forget_if_done(progress):
            return []
        self._over = step, layer
        return self._early(step, layer + 1, now_ns)

    def drop(self, step: int) -> None:
        """Forgets a step's fetches. Groups that are being read land as plain residents."""
        _remember(self._dropped, step, 0, LINK_MESSAGES_MAX)
        self.ahead.drop(step)
        for progress in [p for (s, _), p in self._fetches.items() if s == step]:
            self._give_back(progress)

    def group(self, tag: int) -> Group:
        """The group that is read under `tag`."""
        return self._groups.get(tag)

    def _check(self, fetch: Fetch) -> Ids:
        neurons = self._geometry.neurons
        if not 0 <= fetch.layer < len(self.pools):
            raise BadFetchError(f"layer {fetch.layer} of {len(self.pools)}")
        if len(fetch.ids) % 4 or len(fetch.ids) > 4 * neurons:
            raise BadFetchError(f"{len(fetch.ids)} bytes of ids")
        ids = np.frombuffer(fetch.ids, "<i4").astype(np.int64)
        ahead = fetch.prefetch
        if len(ids) and not (ids.min() >= 0 and ids.max() < neurons):
            raise BadFetchError(f"ids are not within {neurons} neurons")
        if ahead and not _differ(ids, neurons):
            raise BadFetchError("an id is there twice")
        if not ahead and not (ids[1:] > ids[:-1]).all():
            raise BadFetchError("ids do not ascend")
        known = self.ahead.knows if ahead else self._knows
        if known(fetch.step, fetch.layer):
            raise BadFetchError(f"layer {fetch.layer} of step {fetch.step} is under way")
        if self.ahead.full() if ahead else len(self._fetches) >= FETCHES_MAX:
            raise BadFetchError(f"{FETCHES_MAX} fetches are under way (limit FETCHES_MAX)")
        return ids

    def _knows(self, step: int, layer: int) -> bool:
        progress = self._fetches.get((step, layer))
        return progress is not None and progress.asked

    def _is_late(self, fetch: Fetch) -> bool:
        """Whether a prefetch is of a layer that has passed."""
        step = fetch.step
        if step in self._dropped or step < self._newest:
            return True
        return self._steps.get(step, -1) >= fetch.layer

    def _begin(self, fetch: Fetch, demanded: int) -> None:
        """Our clock: how many steps there were. A step's number is not: it may skip."""
        if fetch.step not in self._steps:
            self._now += 1
            self._newest = fetch.step
            _remember(self._steps, fetch.step, demanded, STEPS_KEPT)
            for progress in [p for p in self._fetches.values() if not p.asked]:
                self._give_back(progress)  # its step is over without its layer
        self._steps[fetch.step] = max(self._steps[fetch.step], demanded)
        self.pools[fetch.layer].expire(self._now)

    def _early(self, step: int, layer: int, now_ns: int) -> list[Resident]:
        """Sends what is resident of a layer's look-ahead, though the layer has not asked yet."""
        found = self.ahead.find(step, layer)
        if self._extras == "none" or found is None or (step, layer) in self._fetches:
            return []
        pool = self.pools[layer]
        # The surest; and half of the slots stay for what the layer will ask for.
        ids = found.named[pool.find(layer, found.named)[0]][: pool.usable // 2]
        if not len(ids):
            return []
        progress = self._fetches[step, layer] = Progress(found.fetch, now_ns, ids[:0], early=ids)
        return [progress.part(ids, pool.pin(layer, ids), Brought(cached=True), now_ns)]

    def _answer(self, fetch: Fetch, ids: Ids, now_ns: int) -> list[Resident]:
        """The answer to a new demand: its hits, and what look-ahead brought for it."""
        layer, neurons = fetch.layer, self._geometry.neurons
        pool = self.pools[layer]
        progress = self._fetches.get((fetch.step, layer)) or Progress(fetch, now_ns, ids[:0])
        self._fetches[fetch.step, layer] = progress
        early = ids[:0] if progress.early is None else progress.early
        sent = among(ids, early, neurons)
        resident, _ = pool.find(layer, ids)
        hits, todo = ids[resident & ~sent], ids[~resident & ~sent]
        slots = pool.pin(layer, hits)
        used = ids[resident | sent]
        self._used = layer, used
        # Only now that the hits are pinned, what look-ahead protected may go.
        ahead = self.ahead.pass_by(fetch.step, layer, ids)
        read = ahead.read if ahead else ids[:0]
        extra = self._extra(layer, np.concatenate([ids, early]), len(todo), ahead)
        self.hits += len(ids) - len(todo)
        self.misses += len(todo)
        brought = Brought(
            cached=True,
            prefetched=int(np.count_nonzero(among(used, read, neurons))),
            extra=len(extra) + len(early) - int(np.count_nonzero(sent)),
            reads=sum(len(group.reads) for group in ahead.groups) if ahead else 0,
            bytes_read=len(read) * self._geometry.stride_bytes,
            wasted_bytes=(ahead.wasted if ahead else 0) * self._geometry.stride_bytes,
        )
        if len(extra):
            hits = np.concatenate([hits, extra])
            slots = np.concatenate([slots, pool.pin(layer, extra)])
        # Of a whole layer the first slots should come back soon: the misses stream through them.
        streams = len(todo) and is_whole(fetch, neurons)
        size = self._bundles_max if streams else max(len(hits), 1)
        left = len(todo) + max(len(hits) - size, 0)
        progress.ask(fetch, now_ns, todo, left, self._group_size(len(todo)))
        answers = [progress.part(hits[:size], slots[:size], brought, now_ns)]
        for first in range(size, len(hits), size):
            some, more = slice(first, first + size), Brought(cached=True)
            answers.append(progress.part(hits[some], slots[some], more, now_ns))
        return answers

    def _mark_used(self) -> None:
        """Marks what was answered used: before anything may leave, and when compute has it."""
        if self._used is not None:
            layer, ids = self._used
            self._used = None
            self.pools[layer].use(layer, ids, self._now)

    def _extra(self, layer: int, ids: Ids, misses: int, ahead: Ahead | None) -> Ids:
        """Resident neurons to compute though they are not among `ids`, those that were named or
        sent: they cost no read. Room stays for the misses to stream, and it is that of the neurons
        that the policy would give up anyway."""
        pool = self.pools[layer]
        if self._extras == "resident":
            found = pool.residents(layer)
        elif self._extras == "ahead" and ahead:
            found = ahead.named[pool.find(layer, ahead.named)[0]]
        else:
            return ids[:0]
        room = pool.room() - min(misses, max(1, pool.usable // 2))
        found = found[~among(found, ids, self._geometry.neurons)]
        return pool.most_used(layer, found, max(0, room))

    def _group_size(self, misses: int) -> int:
        """Of a demand's misses, where there are slots for all."""
        return min(max(-(-misses // parts_of(misses)), 1), self._bundles_max)

    def _to_waiting(self, layer: int, now_ns: int) -> list[Resident]:
        """Sends what is resident to the fetches of a layer that have it still to do."""
        pool, answers = self.pools[layer], []
        for progress in self._fetches.values():
            if progress.fetch.layer != layer or not len(progress.todo):
                continue
            resident, _ = pool.find(layer, progress.todo)
            if resident.any():
                ids = progress.todo[resident]
                progress.todo = progress.todo[~resident]
                pool.use(layer, ids, self._now)
                answers.append(progress.part(ids, pool.pin(layer, ids), NOTHING, now_ns))
        return answers

    def _next_groups(self, progress: Progress) -> list[Group]:
        """The next misses of a demand with slots for them; none if there is nothing to be had now:
        no slot, or another fetch is loading the rest."""
        layer = progress.fetch.layer
        pool = self.pools[layer]
        _, absent = pool.find(layer, progress.todo)
        size = min(progress.group_size, max(1, pool.usable // 2))
        places = np.flatnonzero(absent)[: size * (PARTS_IN_FLIGHT_MAX - progress.in_flight)]
        places = places[: self._room(pool, len(places), size)]
        if not len(places):
            return []
        ids = progress.todo[places]
        progress.todo = np.delete(progress.todo, places)
        slots = pool.claim(layer, ids, is_whole(progress.fetch, self._geometry.neurons))
        pool.use(layer, ids, self._now)
        groups = self._groups.plan(progress.fetch, ids, slots, size)
        for group in groups:
            self._groups.begin(group)
            self._read_for[group.tag] = progress
        progress.in_flight += len(groups)
        return groups

    def _room(self, pool: Pool, want: int, size: int) -> int:
        """For how many of `want` misses slots should be claimed now, in groups of `size`."""
        room = pool.room()
        if room >= want:
            return want
        # Too small a group costs more than it brings, if what is held will be released.
        crumb = room % size
        if crumb < min(size, PART_BUNDLES_MIN):
            room -= crumb
        if room or self._is_lent(pool):
            return room
        if not crumb:
            self.ahead.give_up(pool)
        return min(want, pool.room())

    def _is_lent(self, pool: Pool) -> bool:
        """Whether slots of a pool are being read into, or are with compute: room will come."""
        if self._groups.read_into(pool.layers):
            return True
        return any(
            progress.fetch.layer in pool.layers and any(map(len, progress.parts.values()))
            for progress in self._fetches.values()
        )

    def _give_back(self, progress: Progress) -> None:
        for slots in progress.parts.values():
            self.pools[progress.fetch.layer].unpin(slots)
        progress.parts.clear()
        self._end(progress)

    def _end(self, progress: Progress) -> None:
        progress.over = True
        progress.todo = progress.todo[:0]
        self._forget_if_done(progress)

    def _forget_if_done(self, progress: Progress) -> bool:
        if progress.done:
            del self._fetches[progress.fetch.step, progress.fetch.layer]
        return progress.done


def _differ(ids: Ids, neurons: int) -> bool:
    table = np.zeros(neurons, np.bool_)
    table[ids] = True
    return int(np.count_nonzero(table)) == len(ids)


def _remember(latest: dict[int, int], step: int, value: int, count_max: int) -> None:
    """Adds `step` to the `latest` steps, of which only `count_max` are kept."""
    latest[step] = value
    if len(latest) > count_max:
        del latest[next(iter(latest))]
