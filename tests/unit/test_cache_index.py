"""The whole index of the cache, under any history of fetches, landings, releases and drops.

The machine plays the drive and compute: it scribbles over slots that are being read or withdrawn,
and looks at every part it holds after every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from common.messages import Fetch, Resident, Unreadable
from common.policy import HALF_LIFE, NEVER_USED, make_policy
from common.store.geometry import Geometry
from services.reader.cache import NONE, Pool
from services.reader.fetches import BadFetchError, Fetches
from services.reader.groups import Group

NEURONS = 12
GEOMETRY = Geometry(layers=2, neurons=NEURONS, hidden=8, gated=False, dtype="float32")
SCRIBBLE = -7
IDS = st.sets(st.integers(0, NEURONS - 1)).map(sorted) | st.just(list(range(NEURONS)))
LAYERS = st.integers(0, 1)


def ids_of(answer: Resident) -> list[int]:
    return np.frombuffer(answer.ids, "<i4").tolist()


class CacheIndex(RuleBasedStateMachine):
    @initialize(
        slots=st.tuples(st.integers(1, 14), st.integers(1, 6)),
        policy=st.sampled_from(["window", "decay"]),
        window=st.none() | st.integers(1, 3),
        scope=st.sampled_from(["layer", "global"]),
        extras=st.sampled_from(["none", "ahead", "resident"]),
    )
    def begin(
        self, slots: tuple[int, int], policy: str, window: int | None, scope: str, extras: str
    ) -> None:
        self.decays = policy == "decay"
        self.window = None if self.decays else window
        self.extras = extras
        self.fetches = Fetches(GEOMETRY, slots, make_policy(policy, window), scope, extras)
        self.memory = np.full(sum(slots), NONE)  # layer × NEURONS + id of the bytes in each slot
        self.step = 0
        self.clock = 0
        self.keys: dict[tuple[int, int], float] = {}  # of what was used, by layer and neuron
        self.demanded: dict[int, int] = {}  # the last layer of each step
        self.fetched: set[tuple[int, int]] = set()  # steps and layers
        self.named: dict[tuple[int, int], list[int]] = {}  # by prefetch under way
        self.read: dict[tuple[int, int], set[int]] = {}  # what was read for it
        self.groups: dict[int, Group] = {}
        self.held: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # (id, slot) by part
        self.left: dict[tuple[int, int], int] = {}  # neurons to come, by demand under way
        self.early: dict[tuple[int, int], list[int]] = {}  # sent before the demand came

    # What the predictor, compute and the drive do

    @rule(layer=LAYERS, ids=IDS, goes_on=st.booleans())
    def demand(self, layer: int, ids: list[int], goes_on: bool) -> None:
        if goes_on and (self.step, layer) in self.fetched:
            return
        is_new = self.tick(goes_on)
        self.fetched.add((self.step, layer))
        self.demanded[self.step] = max(self.demanded.get(self.step, -1), layer)
        before = self.snapshot()
        (answer,) = self.take(layer, ids, prefetch=False)
        early = self.early.pop((self.step, layer), [])
        self.check_answer(answer, ids, early)
        if is_new:
            self.check_window(answer, before)
        self.use(layer, set(ids) & {*ids_of(answer), *early})
        for key in list(self.named):
            if key[0] != self.step or key[1] <= layer:
                del self.named[key]
        self.left[self.step, layer] = answer.left + (len(ids_of(answer)) if answer.part else 0)
        self.see([answer])
        self.go_on(before)

    @rule(layer=LAYERS, ids=IDS.flatmap(st.permutations), goes_on=st.booleans())
    def prefetch(self, layer: int, ids: list[int], goes_on: bool) -> None:
        if goes_on and (self.step, layer) in self.named:
            return
        self.tick(goes_on)
        late = self.fetches.late_prefetches
        before = self.snapshot()
        answers = self.take(layer, ids, prefetch=True)
        if self.demanded.get(self.step, -1) >= layer:
            assert self.fetches.late_prefetches == late + 1
            assert not answers
        else:
            assert self.fetches.late_prefetches == late
            self.named[self.step, layer] = ids
            self.read[self.step, layer] = set()
        self.see_early(answers)
        self.go_on(before)

    @precondition(lambda self: self.left and self.held)
    @rule(ids=IDS)
    def overtake(self, ids: list[int]) -> None:
        """The next token's prefetch names what a layer still streams through its slots."""
        self.prefetch(next(iter(self.left))[1], ids, goes_on=False)
        self.release_all()
        self.go_on(self.snapshot())

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def land(self, data: Any) -> None:
        group = self.groups.pop(data.draw(st.sampled_from(sorted(self.groups))))
        before = self.snapshot()
        self.bring(group)
        self.go_on(before)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def fail(self, data: Any) -> None:
        group = self.groups.pop(data.draw(st.sampled_from(sorted(self.groups))))
        bad = data.draw(st.lists(st.sampled_from(group.ids.tolist()), min_size=1))
        good = ~np.isin(group.ids, bad)
        self.memory[group.slots[good]] = group.layer * NEURONS + group.ids[good]
        before = self.snapshot()
        answers = self.fetches.fail(group.tag, np.array(bad), "why", 0)
        fetch = group.fetch
        told = not fetch.prefetch and self.left.pop((fetch.step, fetch.layer), None) is not None
        failed, others = answers[:told], answers[told:]
        assert failed == [Unreadable(1, fetch.step, fetch.layer, "why")] * told
        self.see_landed(others, group.ids[good].tolist())
        self.go_on(before)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[key]
        before = self.snapshot()
        self.see_early(self.fetches.release(*key, 0))
        self.go_on(before)

    @rule(step=st.integers(0, 5), layer=st.integers(-1, 3), part=st.integers(-1, 9))
    def release_unknown(self, step: int, layer: int, part: int) -> None:
        count = self.fetches.unknown_releases
        self.fetches.release(step, layer, part, 0)  # steps here are thousands, from 1,000 on
        assert self.fetches.unknown_releases == count + 1

    @rule(back=st.integers(0, 2), late=IDS)
    def drop(self, back: int, late: list[int]) -> None:
        step = self.step - back * 1000
        self.held = {key: part for key, part in self.held.items() if key[0] != step}
        self.left = {key: left for key, left in self.left.items() if key[0] != step}
        self.early = {key: ids for key, ids in self.early.items() if key[0] != step}
        self.named = {key: ids for key, ids in self.named.items() if key[0] != step}
        before = self.snapshot()
        self.fetches.drop(step)
        for prefetch in (False, True):
            frame = np.array(late, "<i4").tobytes()
            assert self.fetches.take(Fetch(1, step, 0, prefetch, 0, frame), 0) == []
        self.go_on(before)
        if back == 0:  # a step that was dropped does not go on
            self.pass_all()

    @rule(layer=LAYERS, count=st.integers(0, 14), back=st.booleans())
    def withdraw(self, layer: int, count: int, back: bool) -> None:
        pool = self.fetches.pools[layer]
        before, usable, room = self.snapshot(), pool.usable, pool.room()
        if back:
            self.memory[pool.restore(count)] = SCRIBBLE
            assert pool.usable == min(usable + count, len(pool))
        else:
            self.memory[pool.withdraw(count)] = SCRIBBLE
            assert pool.usable == usable - min(count, room, usable - 1)
            self.check_all_given_up(before)
        self.go_on(self.snapshot())

    @rule(slots=st.integers(0, 21))
    def resize(self, slots: int) -> None:
        before = self.snapshot()
        change = self.fetches.resize(slots)
        self.memory[change.withdrawn] = self.memory[change.restored] = SCRIBBLE
        assert not set(change.withdrawn) & set(change.restored)
        self.check_all_given_up(before)
        self.go_on(self.snapshot())

    @rule(
        ids=st.sampled_from([[3, 2], [1, 1], [-1, 4], [NEURONS]]), layer=LAYERS, ahead=st.booleans()
    )
    def fetch_nonsense(self, ids: list[int], layer: int, ahead: bool) -> None:
        if ahead and ids == [3, 2]:  # a prefetch's ids need not ascend: the surest are first
            return
        with pytest.raises(BadFetchError):
            self.fetches.take(Fetch(1, 2**62, layer, ahead, 0, np.array(ids, "<i4").tobytes()), 0)

    @rule()
    def settle(self) -> None:
        """If everything lands and is released, every demand ends: nothing waits for ever."""
        while self.groups or self.held:
            for group in list(self.groups.values()):
                del self.groups[group.tag]
                self.bring(group)
            self.release_all()
            self.go_on(self.snapshot())
        assert not self.left
        self.pass_all()
        assert not any(pool.pins.any() for pool in self.fetches.pools)

    # What must hold

    @invariant()
    def what_is_held_is_not_touched(self) -> None:
        for (_, layer, _), part in self.held.items() if hasattr(self, "held") else ():
            pool = self.fetches.pools[layer]
            for neuron, slot in part:
                assert self.memory[slot] == layer * NEURONS + neuron
                assert pool.find(layer, np.array([neuron]))[0].all(), "held, but given up"

    @invariant()
    def index_and_slots_agree(self) -> None:
        if not hasattr(self, "fetches"):
            return
        first = 0
        for pool in self.fetches.each_pool():
            full = np.flatnonzero(pool.neuron_of != NONE)
            assert (pool.slot_of[pool.neuron_of[full]] == full).all()
            assert np.count_nonzero(pool.slot_of != NONE) == len(full)
            assert pool.resident == len(full) - np.count_nonzero(pool.loading)
            assert pool.usable == len(pool) - np.count_nonzero(pool.withdrawn) >= 1
            assert not pool.withdrawn[full].any()
            assert pool.pinned == np.count_nonzero(pool.pins)
            resident = full[~pool.loading[full]]
            numbers = pool.layers.start * NEURONS + pool.neuron_of[resident]
            assert (self.memory[first + resident] == numbers).all()
            self.check_pins(pool, first)
            first += len(pool)

    # Helpers

    def tick(self, goes_on: bool) -> bool:
        is_new = not goes_on or self.step == 0
        if is_new:  # what was sent for layers that were never asked for is given back
            self.held = {k: part for k, part in self.held.items() if k[:2] not in self.early}
            self.early.clear()
        self.step += 1000 * is_new
        self.clock += is_new
        return is_new

    def take(self, layer: int, ids: list[int], prefetch: bool) -> list[Resident]:
        frame = np.array(ids, "<i4").tobytes()
        return self.fetches.take(Fetch(1, self.step, layer, prefetch, 0, frame), 0)

    def bring(self, group: Group) -> None:
        self.memory[group.slots] = group.layer * NEURONS + group.ids
        self.see_landed(self.fetches.land(group.tag, 0), group.ids.tolist())

    def release_all(self) -> None:
        for key in list(self.held):
            del self.held[key]
            self.see_early(self.fetches.release(*key, 0))

    def pass_all(self) -> None:
        """A new step's demand, for nothing, of the last layer: no prefetch is under way then."""
        self.tick(goes_on=False)
        self.named.clear()
        self.fetched.add((self.step, 1))
        self.demanded[self.step] = 1
        self.take(1, [], prefetch=False)
        self.fetches.release(self.step, 1, 0, 0)

    def check_answer(self, answer: Resident, ids: list[int], early: list[int]) -> None:
        """The answer to the demand of `ids`: hits, then extras, and what their look-ahead cost."""
        key = answer.step, answer.layer
        named, read = self.named.get(key, []), self.read.get(key, set())
        there, sent = ids_of(answer), set(early) & set(ids)
        count = len(there) + len(early) - len(sent) - answer.extra
        hits, extra = there[:count], there[count:]
        assert set(hits) <= set(ids) - set(early)
        assert answer.left == len(ids) - len(hits) - len(sent)
        assert not set(extra) & {*ids, *early}
        assert self.extras != "none" or not extra
        assert self.extras != "ahead" or set(extra) <= set(named)
        hits += list(sent)
        if key in self.named:
            assert answer.prefetched == len(read & set(hits))
            assert answer.bytes_read == len(read) * GEOMETRY.stride_bytes
            assert answer.wasted_bytes == len(read - set(ids)) * GEOMETRY.stride_bytes

    def check_window(self, answer: Resident, before: list[dict[tuple[int, int], float]]) -> None:
        """No neuron that nobody held when the token began is a hit, if it had left the window."""
        for neuron in ids_of(answer) if self.window is not None else ():
            for was in before:
                key = was.get((answer.layer, neuron), self.clock)
                assert self.clock - key <= self.window, "it had left"

    def check_pins(self, pool: Pool, first: int) -> None:
        """Pins are of parts, of groups, and of prefetches under way that name the neuron."""
        pins = np.zeros(len(pool), int)
        for (_, layer, _), part in self.held.items():
            for _, slot in part if layer in pool.layers else ():
                pins[slot - first] += 1
        for group in self.groups.values():
            if group.layer in pool.layers:
                pins[group.slots - first] += 1
                assert pool.loading[group.slots - first].all()
        protections = np.zeros(len(pool), int)
        for (_, layer), ids in self.named.items():
            if layer in pool.layers:
                slots = pool.slot_of[(layer - pool.layers.start) * NEURONS + np.array(ids, int)]
                protections[slots[slots != NONE]] += 1
        assert (pool.pins >= pins).all()
        assert (pool.pins <= pins + protections).all()

    def snapshot(self) -> list[dict[tuple[int, int], float]]:
        """Per pool, the keys of resident neurons that nobody holds, by layer and id."""
        return [
            {
                (where := divmod(pool.layers.start * NEURONS + number, NEURONS)): self.keys.get(
                    where, NEVER_USED
                )
                for number in pool.neuron_of[pool.pins == 0].tolist()
                if number != NONE
            }
            for pool in self.fetches.each_pool()
        ]

    def use(self, layer: int, ids: Iterable[int]) -> None:
        for neuron in ids:
            count = 0.0
            if self.decays and (layer, neuron) in self.keys:
                count = 2 ** (self.keys[layer, neuron] - self.clock / HALF_LIFE)
            now = math.log2(count + 1) + self.clock / HALF_LIFE
            self.keys[layer, neuron] = now if self.decays else self.clock

    def go_on(self, before: list[dict[tuple[int, int], float]]) -> None:
        """Begins what can begin, and checks what was given up for it."""
        for group in self.fetches.groups():
            self.groups[group.tag] = group
            self.memory[group.slots] = SCRIBBLE
            if group.fetch.prefetch:
                self.check_nothing_left_to_read()
                self.read[group.fetch.step, group.layer] |= set(group.ids.tolist())
            else:
                self.use(group.layer, group.ids.tolist())
                assert len(group.ids) <= max(1, self.fetches.pools[group.layer].usable // 2)
        self.check_all_given_up(before)

    def check_nothing_left_to_read(self) -> None:
        """No demand waits for anything that is not on its way."""
        coming = sum(len(group.ids) for group in self.groups.values() if self.is_awaited(group))
        assert sum(self.left.values()) == coming

    def is_awaited(self, group: Group) -> bool:
        fetch = group.fetch
        return not fetch.prefetch and (fetch.step, fetch.layer) in self.left

    def check_all_given_up(self, before: list[dict[tuple[int, int], float]]) -> None:
        for pool, was, now in zip(self.fetches.each_pool(), before, self.snapshot(), strict=True):
            gone = [where for where in was if self.is_gone(pool, *where)]
            floor = NEVER_USED if self.window is None else self.clock - self.window
            inside = [was[where] for where in gone if was[where] >= floor]
            if inside:
                free = (pool.neuron_of == NONE) & ~pool.withdrawn
                assert not free.any(), "what is in the window is kept while room lasts"
                stay = [now[where] for where in now if where in was]
                assert max(inside) <= min(stay, default=math.inf) + 1e-9, "lowest keys leave first"

    def is_gone(self, pool: Pool, layer: int, neuron: int) -> bool:
        return bool(pool.find(layer, np.array([neuron]))[1].all())

    def see_early(self, answers: list[Resident]) -> None:
        """What is sent before its layer asks: some of what its look-ahead named, once."""
        for answer in answers:
            key, ids = (answer.step, answer.layer), ids_of(answer)
            assert self.extras != "none"
            assert set(ids) <= set(self.named[key])
            assert key not in self.early
            assert key not in self.left
            assert (answer.part, answer.left, answer.extra) == (0, -1, 0)
            assert 0 < len(ids) <= self.fetches.pools[answer.layer].usable // 2
            self.early[key] = ids
            slots = np.frombuffer(answer.slots, "<i4").tolist()
            self.held[(*key, 0)] = list(zip(ids, slots, strict=True))

    def see_landed(self, answers: Sequence[Any], landed: list[int]) -> None:
        for answer in answers:
            assert set(ids_of(answer)) <= set(landed), "what landed, and no more"
            if answer.reads == 0:  # the group is another fetch's: only now this one uses it
                self.use(answer.layer, ids_of(answer))
        self.see(answers)

    def see(self, answers: Iterable[Resident | Unreadable]) -> None:
        for answer in answers:
            assert isinstance(answer, Resident)
            ids = ids_of(answer)
            slots = np.frombuffer(answer.slots, "<i4").tolist()
            key = answer.step, answer.layer
            self.left[key] -= len(ids) if answer.part else 0
            assert self.left[key] == answer.left >= 0
            if not answer.left:
                del self.left[key]
            assert (*key, answer.part) not in self.held
            self.held[(*key, answer.part)] = list(zip(ids, slots, strict=True))


TestCacheIndex = CacheIndex.TestCase
TestCacheIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
