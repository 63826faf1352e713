"""The whole index of the cache, under any history of fetches, landings, releases and drops.

The machine plays the drive and compute: it scribbles over slots that are being read, and looks at
every part it holds after every step.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from common.store.geometry import Geometry
from services.reader.cache import NONE
from services.reader.fetches import BadFetchError, Fetches, Group

NEURONS = 12
GEOMETRY = Geometry(layers=2, neurons=NEURONS, hidden=8, gated=False, dtype="float32")
SCRIBBLE = -7
IDS = st.sets(st.integers(0, NEURONS - 1)).map(sorted)


class CacheIndex(RuleBasedStateMachine):
    @initialize(
        slots=st.tuples(st.integers(1, 14), st.integers(1, 6)),
        window=st.none() | st.integers(1, 3),
    )
    def begin(self, slots: tuple[int, int], window: int | None) -> None:
        self.window = window
        self.fetches = Fetches(GEOMETRY, slots, window)
        self.memory = np.full(sum(slots), NONE)  # which neuron's bytes lie in each slot
        self.step = 0
        self.clock = 0
        self.used: dict[tuple[int, int], int] = {}  # token of the last use, by layer and neuron
        self.fetched: set[tuple[int, int]] = set()  # steps and layers
        self.groups: dict[int, Group] = {}
        self.held: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # (id, slot) by part
        self.left: dict[tuple[int, int], int] = {}  # neurons to come, by fetch under way

    # What compute and the drive do

    @rule(layer=st.integers(0, 1), ids=IDS, goes_on=st.booleans())
    def fetch(self, layer: int, ids: list[int], goes_on: bool) -> None:
        new = not goes_on or self.step == 0
        if not new and (self.step, layer) in self.fetched:
            return
        self.step += new * 1000
        self.clock += new
        self.fetched.add((self.step, layer))
        before = self.snapshot()
        message = Fetch(1, self.step, layer, 0, np.array(ids, "<i4").tobytes())
        self.left[self.step, layer] = len(ids)
        answers = self.fetches.take(message, 0)
        for answer in answers:
            self.check_hits(layer, answer, before[layer])
            self.use(layer, np.frombuffer(answer.ids, "<i4"))
        self.see(answers)
        self.go_on(before)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def land(self, data: Any) -> None:
        group = self.groups.pop(data.draw(st.sampled_from(sorted(self.groups))))
        before = self.snapshot()
        self.memory[group.reads.slots] = group.ids
        self.see(self.fetches.land(group.tag, 0))
        self.go_on(before)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def fail(self, data: Any) -> None:
        group = self.groups.pop(data.draw(st.sampled_from(sorted(self.groups))))
        bad = data.draw(st.lists(st.sampled_from(group.ids.tolist()), min_size=1))
        good = ~np.isin(group.ids, bad)
        self.memory[group.reads.slots[good]] = group.ids[good]
        before = self.snapshot()
        answers = self.fetches.fail(group.tag, np.array(bad), "why")
        fetch = group.progress.fetch
        told = self.left.pop((fetch.step, fetch.layer), None) is not None
        assert answers == [Unreadable(1, fetch.step, fetch.layer, "why")] * told
        self.go_on(before)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[key]
        before = self.snapshot()
        self.fetches.release(*key)
        self.go_on(before)

    @rule(step=st.integers(0, 5), layer=st.integers(-1, 3), part=st.integers(-1, 9))
    def release_unknown(self, step: int, layer: int, part: int) -> None:
        count = self.fetches.unknown_releases
        self.fetches.release(step, layer, part)  # steps here are thousands, from 1,000 on
        assert self.fetches.unknown_releases == count + 1

    @rule(back=st.integers(0, 2), late=IDS)
    def drop(self, back: int, late: list[int]) -> None:
        step = self.step - back * 1000
        self.held = {key: part for key, part in self.held.items() if key[0] != step}
        self.left = {key: left for key, left in self.left.items() if key[0] != step}
        before = self.snapshot()
        self.fetches.drop(step)
        assert self.fetches.take(Fetch(1, step, 0, 0, np.array(late, "<i4").tobytes()), 0) == []
        self.go_on(before)
        if back == 0:
            self.step += 1000  # a step that was dropped does not go on
            self.clock += 1
            self.fetched.add((self.step, 1))
            self.fetches.take(Fetch(1, self.step, 1, 0, b""), 0)
            self.fetches.release(self.step, 1, 0)

    @rule(ids=st.sampled_from([[3, 2], [1, 1], [-1, 4], [NEURONS]]), layer=st.integers(0, 1))
    def fetch_nonsense(self, ids: list[int], layer: int) -> None:
        with pytest.raises(BadFetchError):
            self.fetches.take(Fetch(1, 2**62, layer, 0, np.array(ids, "<i4").tobytes()), 0)

    @rule()
    def settle(self) -> None:
        """If everything lands and is released, every fetch ends: nothing waits for ever."""
        while self.groups or self.held:
            for group in list(self.groups.values()):
                del self.groups[group.tag]
                self.memory[group.reads.slots] = group.ids
                self.see(self.fetches.land(group.tag, 0))
            for key in list(self.held):
                del self.held[key]
                self.fetches.release(*key)
            self.go_on(self.snapshot())
        assert not self.left
        assert not any(cache.pins.any() for cache in self.fetches.caches)

    # What must hold

    @invariant()
    def what_is_held_is_not_touched(self) -> None:
        for (_, layer, _), part in self.held.items() if hasattr(self, "held") else ():
            for neuron, slot in part:
                assert self.memory[slot] == neuron
                assert self.fetches.caches[layer].slot_of[neuron] >= 0, "held, but given up"

    @invariant()
    def index_and_slots_agree(self) -> None:
        if not hasattr(self, "fetches"):
            return
        for layer, cache in enumerate(self.fetches.caches):
            full = np.flatnonzero(cache.neuron_of != NONE)
            assert (cache.slot_of[cache.neuron_of[full]] == full).all()
            assert np.count_nonzero(cache.slot_of != NONE) == len(full)
            assert cache.resident == len(full) - np.count_nonzero(cache.loading)
            first = self.fetches.first_slot[layer]
            resident = full[~cache.loading[full]]
            assert (self.memory[first + resident] == cache.neuron_of[resident]).all()
            assert (cache.pins == self.expected_pins(layer)).all()

    # Helpers

    def expected_pins(self, layer: int) -> np.ndarray:
        cache = self.fetches.caches[layer]
        pins = np.zeros(cache.slots, int)
        for (_, its_layer, _), part in self.held.items():
            if its_layer == layer:
                for _, slot in part:
                    pins[slot - self.fetches.first_slot[layer]] += 1
        for group in self.groups.values():
            if group.layer == layer:
                pins[group.slots] += 1
                assert cache.loading[group.slots].all()
        return pins

    def snapshot(self) -> list[dict[int, int]]:
        """Per layer, the tokens in which resident neurons that nobody holds were last used."""
        return [
            {
                neuron: self.used[layer, neuron]
                for neuron in cache.neuron_of[cache.pins == 0].tolist()
                if neuron != NONE
            }
            for layer, cache in enumerate(self.fetches.caches)
        ]

    def use(self, layer: int, ids: np.ndarray) -> None:
        for neuron in ids.tolist():
            self.used[layer, neuron] = self.clock

    def go_on(self, before: list[dict[int, int]]) -> None:
        """Begins what can begin, and checks what was given up for it."""
        for step in self.fetches.groups(0):
            if isinstance(step, Group):
                self.groups[step.tag] = step
                self.use(step.layer, step.ids)
                self.memory[step.reads.slots] = SCRIBBLE
                assert len(step.ids) <= max(1, self.fetches.caches[step.layer].slots // 2)
            else:
                self.use(step.layer, np.frombuffer(step.ids, "<i4"))
                self.see([step])
        for layer, was in enumerate(before):
            self.check_given_up(layer, was)

    def check_given_up(self, layer: int, was: dict[int, int]) -> None:
        cache = self.fetches.caches[layer]
        now = self.snapshot()[layer]
        gone = [neuron for neuron in was if cache.slot_of[neuron] == NONE]
        inside = [n for n in gone if self.window is None or self.clock - was[n] <= self.window]
        if not inside:
            return
        assert (cache.neuron_of != NONE).all(), "the window is kept while room lasts"
        oldest = min((now[n] for n in now if n in was), default=self.clock)
        assert max(was[n] for n in inside) <= oldest, "the least recently used leave first"

    def check_hits(self, layer: int, answer: Resident, was: dict[int, int]) -> None:
        for neuron in np.frombuffer(answer.ids, "<i4").tolist():
            if self.window is not None and neuron in was:
                assert self.clock - was[neuron] <= self.window, "it had left the window"

    def see(self, answers: Iterable[Resident | Unreadable]) -> None:
        for answer in answers:
            assert isinstance(answer, Resident)
            ids = np.frombuffer(answer.ids, "<i4").tolist()
            slots = np.frombuffer(answer.slots, "<i4").tolist()
            key = answer.step, answer.layer
            self.left[key] -= len(ids)
            assert self.left[key] == answer.left >= 0
            if not answer.left:
                del self.left[key]
            assert (*key, answer.part) not in self.held
            self.held[(*key, answer.part)] = list(zip(ids, slots, strict=True))


TestCacheIndex = CacheIndex.TestCase
TestCacheIndex.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
