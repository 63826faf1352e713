"""How one fetch goes, by example: hits, parts and their sizes, waiting, failing, dropping."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import SettingError
from common.limits import PART_BUNDLES_MIN, PART_BYTES_MAX, PARTS_IN_FLIGHT_MAX
from common.messages import Fetch, Resident, Unreadable
from common.policy import Window
from common.store.geometry import Geometry
from services.reader.fetches import BadFetchError, Fetches
from services.reader.groups import Group

NEURONS = 1024
GEOMETRY = Geometry(layers=2, neurons=NEURONS, hidden=2048, gated=False, dtype="float32")
assert GEOMETRY.stride_bytes == 16384


def reader(slots: int = 100, window: int | None = None) -> Fetches:
    return Fetches(GEOMETRY, (slots, slots), Window(window), "layer", "none")


def fetch(ids: object, step: int = 1, layer: int = 0) -> Fetch:
    return Fetch(9, step, layer, False, 5, np.array(ids, "<i4").tobytes())


def ids_of(answer: Resident) -> list[int]:
    return np.frombuffer(answer.ids, "<i4").tolist()


def slots_of(answer: Resident) -> list[int]:
    return np.frombuffer(answer.slots, "<i4").tolist()


def begun(fetches: Fetches) -> list[Group]:
    """The groups that can begin."""
    return list(fetches.groups())


def take(fetches: Fetches, ids: object, step: int = 1, layer: int = 0) -> Resident:
    """Part 0 of a demand."""
    (answer,) = fetches.take(fetch(ids, step, layer), 0)
    assert (answer.step, answer.layer, answer.part) == (step, layer, 0)
    return answer


def fill(fetches: Fetches, ids: object, step: int = 1, layer: int = 0) -> None:
    """Demands `ids`, lands and releases them."""
    take(fetches, ids, step, layer)
    fetches.release(step, layer, 0, 0)
    while groups := begun(fetches):
        for group in groups:
            (answer,) = fetches.land(group.tag, 0)
            fetches.release(step, layer, answer.part, 0)


def test_misses_only():
    fetches = reader(1024)
    (first,) = fetches.take(fetch([3, 4, 9], layer=1), 100)
    assert (first.part, first.left, first.ids, first.slots) == (0, 3, b"", b"")
    (group,) = begun(fetches)
    assert group.layer == 1
    assert group.reads.offsets.tolist() == [3 * 16384, 9 * 16384]
    assert group.slots.tolist() == [1024, 1025, 1026], "of the whole cache"
    (answer,) = fetches.land(group.tag, 200)
    assert answer == Resident(
        request=9, step=1, layer=1, part=1, left=0, cached=False, prefetched=0, extra=0, reads=2,
        bytes_read=3 * 16384, wasted_bytes=0, read_ns=0, named_ns=5, taken_ns=100, landed_ns=200,
        ids=answer.ids, slots=answer.slots,
    )  # fmt: skip
    assert ids_of(answer) == [3, 4, 9]
    assert slots_of(answer) == [1024, 1025, 1026]
    assert (fetches.hits, fetches.misses) == (0, 3)


def test_hits_go_at_once_and_say_how_many_are_to_come():
    fetches = reader()
    fill(fetches, [5, 6])
    (answer,) = fetches.take(fetch([4, 5, 6, 7], step=2), 100)
    assert ids_of(answer) == [5, 6]
    assert (answer.part, answer.left, answer.reads, answer.bytes_read) == (0, 2, 0, 0)
    (group,) = begun(fetches)
    assert group.ids.tolist() == [4, 7]
    (last,) = fetches.land(group.tag, 300)
    assert (last.part, last.left, last.taken_ns, last.landed_ns) == (1, 0, 100, 300)


def test_the_hits_of_a_whole_layer_are_several_parts():
    """As soon as the first is released, the misses stream through its slots."""
    wide = Geometry(layers=2, neurons=NEURONS, hidden=4096, gated=False, dtype="float32")
    missing = 2 * PART_BUNDLES_MIN
    slots, size = NEURONS - missing, PART_BYTES_MAX // wide.stride_bytes
    fetches = Fetches(wide, (slots, slots), Window(None), "layer", "none")
    fill(fetches, np.arange(slots))
    parts = fetches.take(fetch(np.arange(NEURONS), step=2), 0)
    assert [len(ids_of(part)) for part in parts] == [size, slots - size]
    assert [part.cached for part in parts] == [True, True]
    assert [part.left for part in parts] == [NEURONS - size, missing]
    assert [*ids_of(parts[0]), *ids_of(parts[1])] == list(range(slots))
    assert begun(fetches) == [], "all slots are with compute"
    fetches.release(2, 0, 0, 0)
    groups = begun(fetches)
    assert [i for group in groups for i in group.ids.tolist()] == list(range(slots, NEURONS))
    late = [fetches.land(group.tag, 0)[0] for group in groups]
    assert [part.left for part in late] == [PART_BUNDLES_MIN, 0]
    assert not any(part.cached for part in late)
    assert (fetches.hits, fetches.misses) == (slots, slots + missing)


def test_the_hits_of_a_whole_layer_are_one_part_where_nothing_is_missing():
    fetches = reader(NEURONS)
    fill(fetches, np.arange(NEURONS))
    (part,) = fetches.take(fetch(np.arange(NEURONS), step=2), 0)
    assert (len(ids_of(part)), part.left) == (NEURONS, 0)


def test_all_hits_read_nothing():
    fetches = reader()
    fill(fetches, [5, 6])
    (answer,) = fetches.take(fetch([5, 6], step=2), 0)
    assert (answer.part, answer.left) == (0, 0)
    assert begun(fetches) == []


def test_nothing_asked_is_one_empty_part():
    fetches = reader()
    (answer,) = fetches.take(fetch([]), 0)
    assert (answer.part, answer.left, ids_of(answer), slots_of(answer)) == (0, 0, [], [])
    fetches.release(1, 0, 0, 0)
    assert fetches.unknown_releases == 0


def test_many_misses_are_as_many_parts_as_may_be_in_flight():
    fetches = reader(1024)
    fetches.take(fetch(np.arange(0, 800, 2)), 0)
    assert [len(group.ids) for group in begun(fetches)] == [100] * PARTS_IN_FLIGHT_MAX


@pytest.mark.parametrize(("misses", "parts"), [
    (1, [1]), (100, [100]), (2 * PART_BUNDLES_MIN - 1, [2 * PART_BUNDLES_MIN - 1]),
    (129, [65, 64]), (200, [67, 67, 66]), (1000, [250] * 4),
])  # fmt: skip
def test_parts_are_no_smaller_than_they_are_worth_and_of_one_size(misses, parts):
    fetches = reader(1024)
    fetches.take(fetch(np.arange(misses)), 0)
    assert [len(group.ids) for group in begun(fetches)] == parts


def test_what_an_answer_used_is_marked_before_anything_leaves():
    fetches = reader(2)
    fill(fetches, [1], step=1)
    fill(fetches, [2], step=2)
    (hits,) = fetches.take(fetch([1], step=3), 0)
    fetches.release(3, 0, hits.part, 0)
    fill(fetches, [3], step=4)
    assert fetches.pools[0].residents(0).tolist() == [1, 3]


def test_a_whole_layer_streams_through_few_slots():
    fetches = reader(20)
    fetches.take(fetch(np.arange(NEURONS)), 0)
    seen: list[int] = []
    waiting: list[Group] = []
    while len(seen) < NEURONS:
        waiting += begun(fetches)
        assert sum(len(group.ids) for group in waiting) <= 20, "one lands while one is multiplied"
        (answer,) = fetches.land(waiting.pop(0).tag, 0)
        seen += ids_of(answer)
        assert answer.left == NEURONS - len(seen)
        fetches.release(1, 0, answer.part, 0)
    assert sorted(seen) == list(range(NEURONS))
    assert fetches.pools[0].evictions == NEURONS - 20


def test_one_slot_is_enough():
    fetches = reader(1, 1)
    fill(fetches, [1, 2, 3])
    assert fetches.misses == 3
    assert fetches.pools[0].slot_of[[1, 2, 3]].tolist() == [-1, -1, 0]


def test_no_slot_waits_for_a_release():
    fetches = reader(4)
    fill(fetches, [0, 1, 2, 3])
    (hits,) = fetches.take(fetch([0, 1, 2, 3, 4], step=2), 0)
    assert begun(fetches) == []
    fetches.release(2, 0, hits.part, 0)
    (group,) = begun(fetches)
    assert group.ids.tolist() == [4]


def test_a_crumb_of_room_waits_for_more():
    fetches = reader(200)
    fill(fetches, np.arange(190))
    (hits,) = fetches.take(fetch(np.arange(400), step=2), 0)
    assert begun(fetches) == [], "10 slots are free, but parts of 10 are not worth it"
    fetches.release(2, 0, hits.part, 0)
    assert [len(group.ids) for group in begun(fetches)] == [70, 70]


def test_a_neuron_that_another_fetch_is_loading_is_waited_for():
    fetches = reader()
    fetches.take(fetch([1, 2]), 0)
    (loading,) = begun(fetches)
    fetches.drop(1)
    assert take(fetches, [2, 3], step=2).left == 2
    (group,) = begun(fetches)
    assert group.ids.tolist() == [3], "2 is on its way"
    (late,) = fetches.land(loading.tag, 0)
    assert (late.step, ids_of(late), late.left, late.reads) == (2, [2], 1, 0), "nobody asks for 1"
    (last,) = fetches.land(group.tag, 0)
    assert last.left == 0


def test_a_dropped_step_reads_nothing_more_and_keeps_what_lands():
    fetches = reader(20)
    fetches.take(fetch(np.arange(100)), 0)
    groups = begun(fetches)
    (answer,) = fetches.land(groups[0].tag, 0)
    fetches.drop(1)
    assert fetches.land(groups[1].tag, 0) == []
    assert begun(fetches) == []
    assert fetches.pools[0].room() == 20, "its parts are released"
    fetches.release(1, 0, answer.part, 0)
    assert fetches.unknown_releases == 1, "compute's Release crossed its Drop"
    (hits,) = fetches.take(fetch(np.arange(100), step=2), 0)
    assert ids_of(hits) == list(range(20))


def test_a_fetch_that_its_drop_overtook_is_ignored():
    fetches = reader(20)
    fetches.drop(7)
    assert fetches.take(fetch([1], step=7), 0) == []
    assert begun(fetches) == []
    assert fetches.late_fetches == 1


def test_an_unreadable_bundle_ends_its_fetch_and_no_other():
    fetches = reader()
    fetches.take(fetch(np.arange(100)), 0)
    fetches.take(fetch([5], layer=1), 0)
    first, second, other = begun(fetches)
    (answer,) = fetches.land(first.tag, 0)
    assert fetches.fail(second.tag, np.array([60]), "why", 0) == [Unreadable(9, 1, 0, "why")]
    assert fetches.pools[0].slot_of[60] == -1
    assert fetches.pools[0].slot_of[61] >= 0, "its neighbours came right"
    fetches.release(1, 0, answer.part, 0)
    assert fetches.pools[0].room() == 100
    assert len(fetches.land(other.tag, 0)) == 1
    assert begun(fetches) == []


def test_what_came_right_beside_an_unreadable_bundle_is_sent_to_whom_it_is_read_for_as_well():
    fetches = reader(200)
    fetches.take(fetch([1, 2]), 0)
    (group,) = begun(fetches)
    fetches.take(fetch([2], step=2), 0)
    assert begun(fetches) == [], "it is being read"
    failed, answer = fetches.fail(group.tag, np.array([1]), "why", 0)
    assert failed == Unreadable(9, 1, 0, "why")
    assert (answer.step, ids_of(answer), answer.left) == (2, [2], 0)


def test_a_second_failure_of_a_fetch_says_nothing():
    fetches = reader(200)
    fetches.take(fetch(np.arange(2 * PART_BUNDLES_MIN)), 0)
    first, second = begun(fetches)
    assert len(fetches.fail(first.tag, first.ids, "why", 0)) == 1
    assert fetches.fail(second.tag, second.ids, "why", 0) == []


def test_the_window_is_counted_in_steps_whatever_their_numbers():
    fetches = reader(window=2)
    fill(fetches, [1], step=10)
    fill(fetches, [2], step=2**62)
    fill(fetches, [3], step=2**62 + 1)
    (hits,) = fetches.take(fetch([1, 2, 3], step=2**62 + 2), 0)
    assert ids_of(hits) == [2, 3]


def test_layers_of_a_step_are_one_token():
    fetches = reader(window=1)
    fill(fetches, [1], step=1, layer=0)
    fill(fetches, [1], step=1, layer=1)
    (hits,) = fetches.take(fetch([1], step=2, layer=0), 0)
    assert ids_of(hits) == [1]


@pytest.mark.parametrize(
    "bad",
    [
        fetch([1], layer=2),
        fetch([1], layer=-1),
        fetch([1, 1]),
        fetch([2, 1]),
        fetch([-1]),
        fetch([NEURONS]),
        Fetch(9, 1, 0, False, 5, b"\0\0\0"),
        fetch(np.arange(NEURONS + 1)),
        fetch([1], step=5),
    ],
    ids=lambda bad: f"{bad.layer}-{bad.ids[:8]!r}",
)
def test_nonsense_is_refused_and_changes_nothing(bad):
    fetches = reader(10, 1)
    fetches.take(fetch([8], step=5), 0)
    before = [pool.slot_of.copy() for pool in fetches.pools]
    with pytest.raises(BadFetchError):
        fetches.take(bad, 0)
    for pool, was in zip(fetches.pools, before, strict=True):
        assert (pool.slot_of == was).all()


def test_fetches_under_way_are_bounded(monkeypatch):
    monkeypatch.setattr("services.reader.fetches.FETCHES_MAX", 3)
    fetches = reader(10)
    for step in range(3):
        fetches.take(fetch([step], step=step), 0)
    with pytest.raises(BadFetchError, match="FETCHES_MAX"):
        fetches.take(fetch([9], step=9), 0)
    fetches.drop(0)
    fetches.take(fetch([9], step=9), 0)


def test_without_bundling_every_part_of_a_bundle_is_a_read() -> None:
    geometry = Geometry(layers=1, neurons=64, hidden=2048, gated=True, dtype="float16")
    fetches = Fetches(geometry, (8,), Window(None), "layer", "none", "off")
    fetches.take(Fetch(9, 1, 0, False, 5, np.array([3, 4, 9], "<i4").tobytes()), 0)
    (group,) = fetches.groups()
    row = geometry.stride_bytes // 3
    assert row == 4096
    bundles = [3 * 3, 4 * 3, 9 * 3]
    assert group.reads.offsets.tolist() == [(b + p) * row for p in range(3) for b in bundles]
    assert group.reads.lengths.tolist() == [row] * 9, "neighbours are not merged"
    pieces = [slot * 3 + p for p in range(3) for slot in group.slots.tolist()]
    assert group.reads.slots.tolist() == pieces
    assert group.bytes_read == 3 * geometry.stride_bytes
    assert [group.neuron(read) for read in (0, 4, 8)] == [3, 4, 9]
    narrow = Geometry(layers=1, neurons=64, hidden=64, gated=False, dtype="float16")
    with pytest.raises(SettingError, match="INFLASH_BUNDLING"):
        Fetches(narrow, (8,), Window(None), "layer", "none", "off")
