"""How look-ahead goes, by example: what it protects and reads, and how it gives way to demands."""

from __future__ import annotations

import numpy as np
import pytest

from common.limits import PREFETCH_BUNDLES_MAX, PREFETCH_GROUPS_IN_FLIGHT_MAX
from common.messages import Fetch, Resident, Unreadable
from common.policy import Window
from common.store.geometry import Geometry
from services.reader.fetches import BadFetchError, Fetches
from services.reader.groups import Group

NEURONS = 1024
STRIDE = 16384
GEOMETRY = Geometry(layers=2, neurons=NEURONS, hidden=2048, gated=False, dtype="float32")
assert GEOMETRY.stride_bytes == STRIDE
SCOPES = pytest.mark.parametrize("scope", ["layer", "global"])


def reader(slots: int = 100, scope: str = "layer", extras: str = "none") -> Fetches:
    return Fetches(GEOMETRY, (slots, slots), Window(None), scope, extras)


def frame(ids: object) -> bytes:
    return np.array(ids, "<i4").tobytes()


def demand(fetches: Fetches, ids: object, step: int = 1, layer: int = 1) -> Resident:
    (answer,) = fetches.take(Fetch(9, step, layer, False, 5, frame(ids)), 0)
    return answer


def prefetch(fetches: Fetches, ids: object, step: int = 1, layer: int = 1) -> None:
    assert fetches.take(Fetch(9, step, layer, True, 5, frame(ids)), 0) == []


def begun(fetches: Fetches) -> list[Group]:
    return list(fetches.groups())


def land_all(fetches: Fetches) -> list[Resident]:
    """Lands what can begin, until nothing can."""
    answers: list[Resident] = []
    while groups := begun(fetches):
        for group in groups:
            answers += fetches.land(group.tag, 0)
    return answers


def fill(fetches: Fetches, ids: object, step: int = 1, layer: int = 1) -> None:
    """Demands `ids`, lands and releases them."""
    parts = [demand(fetches, ids, step, layer)]
    while parts:
        for part in parts:
            fetches.release(step, layer, part.part, 0)
        parts = land_all(fetches)


def ids_of(answer: Resident) -> list[int]:
    return np.frombuffer(answer.ids, "<i4").tolist()


def is_resident(fetches: Fetches, ids: list[int], layer: int = 1) -> list[bool]:
    return fetches.pools[layer].find(layer, np.array(ids, np.int64))[0].tolist()


@SCOPES
def test_what_was_read_ahead_is_a_hit(scope: str):
    fetches = reader(scope=scope)
    fill(fetches, [3])
    prefetch(fetches, [3, 4, 5, 9], step=2)
    (group,) = begun(fetches)
    assert (group.layer, group.ids.tolist()) == (1, [4, 5, 9])
    assert fetches.land(group.tag, 0) == [], "compute hears nothing of it"
    answer = demand(fetches, [3, 4, 9, 10], step=2)
    assert (ids_of(answer), answer.left, answer.extra) == ([3, 4, 9], 1, 0)
    assert (answer.prefetched, answer.reads, answer.bytes_read) == (2, 2, 3 * STRIDE)
    assert answer.wasted_bytes == STRIDE, "5 was read for nothing"
    (miss,) = land_all(fetches)
    assert (ids_of(miss), miss.reads, miss.bytes_read) == ([10], 1, STRIDE)
    assert (fetches.hits, fetches.misses) == (3, 2), "of demands: 3 was a miss once"
    assert (fetches.ahead.prefetched, fetches.ahead.wasted) == (3, 1)


def test_what_is_on_its_way_serves_the_demand_when_it_lands():
    fetches = reader()
    prefetch(fetches, [4, 5])
    (group,) = begun(fetches)
    answer = demand(fetches, [4])
    assert (ids_of(answer), answer.left, answer.prefetched) == ([], 1, 0), "it is late"
    assert (answer.bytes_read, answer.wasted_bytes) == (2 * STRIDE, STRIDE)
    assert begun(fetches) == [], "it is not read twice"
    (late,) = fetches.land(group.tag, 7)
    assert (late.part, ids_of(late), late.left, late.reads, late.landed_ns) == (1, [4], 0, 0, 7)
    fetches.release(1, 1, 0, 0)
    fetches.release(1, 1, 1, 0)
    assert is_resident(fetches, [4, 5]) == [True, True]
    assert fetches.pools[1].room() == 100, "nobody holds them"


def test_demands_go_first():
    fetches = reader(500)
    prefetch(fetches, [1, 2], layer=1)
    demand(fetches, np.arange(300), layer=0)
    first = begun(fetches)
    assert [group.layer for group in first] == [0, 0, 0, 0, 1], "when all of layer 0 is begun"

    fetches = reader(200)
    demand(fetches, np.arange(300), layer=0)
    prefetch(fetches, [1, 2], layer=1)
    groups = begun(fetches)
    assert [group.layer for group in groups] == [0, 0], "half of layer 0 is still to be read"
    assert fetches.ahead.prefetched == 0


def test_little_is_read_ahead_at_once():
    fetches = reader(500)
    prefetch(fetches, np.arange(400))
    groups = begun(fetches)
    assert [len(g.ids) for g in groups] == [PREFETCH_BUNDLES_MAX] * PREFETCH_GROUPS_IN_FLIGHT_MAX
    assert begun(fetches) == []
    fetches.land(groups[0].tag, 0)
    (third,) = begun(fetches)
    assert third.ids[0] == PREFETCH_GROUPS_IN_FLIGHT_MAX * PREFETCH_BUNDLES_MAX
    demand(fetches, [], layer=1)
    dropped = 400 - 3 * PREFETCH_BUNDLES_MAX
    assert fetches.ahead.dropped == dropped, "what is not begun when its layer asks"
    assert begun(fetches) == []
    for group in (groups[1], third):
        fetches.land(group.tag, 0)
    fetches.release(1, 1, 0, 0)
    assert fetches.pools[1].room() == 500, "its slots are free again"
    assert fetches.pools[1].resident == 3 * PREFETCH_BUNDLES_MAX


def test_the_surest_are_read_first():
    fetches = reader(500)
    order = np.random.default_rng(0).permutation(400)
    prefetch(fetches, order)
    for group in begun(fetches):
        first = (group.tag - 1) * PREFETCH_BUNDLES_MAX
        assert set(group.ids) == set(order[first : first + PREFETCH_BUNDLES_MAX])
        assert (np.diff(group.ids) > 0).all(), "within a group, so that neighbours are one read"
        rows = dict(zip(group.ids.tolist(), group.slots.tolist(), strict=True))
        assert {n: int(fetches.pools[1].slot_of[n]) for n in rows} == {
            n: slot - 500 for n, slot in rows.items()
        }


@SCOPES
def test_what_is_protected_stays(scope: str):
    fetches = reader(50, scope)
    fill(fetches, np.arange(50), step=1, layer=1)
    prefetch(fetches, np.arange(10), step=2)
    fill(fetches, np.arange(200, 300), step=2, layer=0)
    assert all(is_resident(fetches, list(range(10))))
    assert demand(fetches, np.arange(10), step=2).left == 0
    if scope == "global":
        assert is_resident(fetches, list(range(10, 50))).count(True) < 40, "others gave way"


def test_protection_is_not_a_use():
    fetches = reader(4)
    fill(fetches, [1, 2, 3, 4], step=1)
    fill(fetches, [3, 4], step=2)
    prefetch(fetches, [1], step=3)
    fill(fetches, [2, 9], step=3)
    assert is_resident(fetches, [1, 2, 3, 4, 9]) == [False, True, True, True, True]


@SCOPES
def test_a_layer_that_asks_ends_the_look_ahead_before_it(scope: str):
    fetches = reader(20, scope)
    prefetch(fetches, [1], step=1, layer=0)
    prefetch(fetches, [2], step=1, layer=1)
    prefetch(fetches, [3], step=2, layer=0)
    land_all(fetches)
    pools = fetches.each_pool()
    assert sum(pool.pinned for pool in pools) == 3
    demand(fetches, [7], step=2, layer=0)
    assert sum(pool.pinned for pool in pools) == 0, "step 1 is over, and layer 0 did not need 3"
    assert fetches.ahead.wasted == 3


def test_a_drop_ends_look_ahead():
    fetches = reader()
    prefetch(fetches, [1])
    (group,) = begun(fetches)
    prefetch(fetches, [1, 2], layer=0)
    fetches.drop(1)
    assert begun(fetches) == []
    assert fetches.land(group.tag, 0) == []
    assert [pool.pinned for pool in fetches.pools] == [0, 0]
    prefetch(fetches, [5])
    assert fetches.late_prefetches == 1


@pytest.mark.parametrize(
    ("step", "layer", "late"), [(5, 0, 1), (5, 1, 1), (4, 1, 1), (6, 0, 0)], ids=str
)
def test_look_ahead_of_what_has_passed_is_late(step: int, layer: int, late: int):
    fetches = reader()
    demand(fetches, [1], step=5, layer=1)
    begun(fetches)
    prefetch(fetches, [7], step=step, layer=layer)
    assert fetches.late_prefetches == late
    assert len(begun(fetches)) == 1 - late


def test_the_same_look_ahead_twice_is_refused():
    fetches = reader()
    prefetch(fetches, [1])
    with pytest.raises(BadFetchError, match="under way"):
        prefetch(fetches, [2])


def test_look_ahead_counts_as_a_token():
    fetches = Fetches(GEOMETRY, (100, 100), Window(1), "layer", "none")
    fill(fetches, [1, 2], step=1)
    prefetch(fetches, [1], step=2)
    prefetch(fetches, [1], step=3)
    answer = demand(fetches, [1, 2], step=3)
    assert ids_of(answer) == [1], "2 was used two tokens ago; 1 was, too, but is protected"


def test_a_bundle_that_comes_wrong_ahead_fails_nobody():
    fetches = reader()
    prefetch(fetches, [4, 5])
    (group,) = begun(fetches)
    assert fetches.fail(group.tag, np.array([4]), "why", 0) == []
    assert fetches.ahead.unreadable == 1
    answer = demand(fetches, [4, 5])
    assert (ids_of(answer), answer.left) == ([5], 1)
    (again,) = begun(fetches)
    assert again.ids.tolist() == [4], "the demand reads it itself"
    assert fetches.fail(again.tag, again.ids, "why", 0) == [Unreadable(9, 1, 1, "why")]


def test_look_ahead_leaves_demands_their_share_of_a_global_pool():
    fetches = reader(50, "global")
    prefetch(fetches, np.arange(400), layer=1)
    land_all(fetches)
    assert fetches.pools[0].room() == 25
    fill(fetches, np.arange(300), layer=0)
    assert fetches.pools[0].room() == 25, "a whole layer streamed through it"


def test_a_demand_that_nothing_else_can_help_takes_protected_slots():
    fetches = reader(2)
    demand(fetches, [1, 2, 3, 4], step=1)
    parts = [part for group in begun(fetches) for part in fetches.land(group.tag, 0)]
    prefetch(fetches, [1, 2], step=2)
    assert begun(fetches) == [], "compute will release"
    for part in parts:
        fetches.release(1, 1, part.part, 0)
    assert [group.ids.tolist() for group in begun(fetches)] == [[3], [4]]


def test_a_demand_that_nothing_else_can_help_makes_do_with_a_crumb():
    fetches = reader(8)
    demand(fetches, np.arange(16), step=1)
    parts = [part for group in begun(fetches) for part in fetches.land(group.tag, 0)]
    prefetch(fetches, np.arange(7), step=2)
    for part in parts:
        fetches.release(1, 1, part.part, 0)
    assert [group.ids.tolist() for group in begun(fetches)] == [[8]]


@pytest.mark.parametrize(
    ("extras", "found"), [("none", []), ("ahead", [5]), ("resident", [2, 3, 5])]
)
@SCOPES
def test_extras(extras: str, found: list[int], scope: str):
    fetches = reader(50, scope, extras)
    fill(fetches, [1, 2, 3])
    fill(fetches, [40], layer=0)
    prefetch(fetches, [1, 5], step=2)
    land_all(fetches)
    answer = demand(fetches, [1, 7], step=2)
    assert (ids_of(answer), answer.extra, answer.left) == ([1, *found], len(found), 1)
    assert len(answer.slots) == len(answer.ids)
    assert fetches.hits == 1
    pool = fetches.pools[1]
    assert pool.pinned == 1 + len(found)
    fetches.release(2, 1, 0, 0)
    assert pool.pinned == 0


def test_an_extra_is_not_a_use():
    fetches = reader(3, extras="resident")
    fill(fetches, [1], step=1)
    fill(fetches, [2], step=2)
    fill(fetches, [3], step=3)
    assert demand(fetches, [2, 3], step=4).extra == 1
    fetches.release(4, 1, 0, 0)
    fill(fetches, [9], step=5)
    assert is_resident(fetches, [1, 2, 3]) == [False, True, True]


def test_all_neurons_leave_nothing_extra():
    fetches = reader(10, extras="resident")
    fill(fetches, [1, 2])
    answer = demand(fetches, np.arange(NEURONS), step=2)
    assert (answer.extra, ids_of(answer)) == (0, [1, 2])


@pytest.mark.parametrize("extras", ["ahead", "resident"])
@pytest.mark.parametrize("misses", [1, 3])
@pytest.mark.parametrize("slots", [1, 2])
def test_extras_leave_the_misses_room_to_stream(extras: str, misses: int, slots: int):
    fetches = reader(slots, extras=extras)
    fill(fetches, [1, 2])
    prefetch(fetches, [1, 2], step=2)
    answer = demand(fetches, np.arange(10, 10 + misses), step=2)
    assert answer.extra == slots - 1
    (group,) = begun(fetches)
    assert group.ids.tolist() == [10], "before compute has released the extra"


def test_what_is_on_its_way_to_pass_is_sent_before_it_has_passed() -> None:
    """In a full pool of all layers a whole layer's look-ahead passes: free with its last pin."""
    fetches = reader(100, "global")
    fill(fetches, range(200), step=1, layer=0)
    prefetch(fetches, range(NEURONS), step=2)
    groups = begun(fetches)
    coming = [neuron for group in groups for neuron in group.ids.tolist()]
    demand(fetches, range(NEURONS), step=2)
    others = begun(fetches)
    assert not {neuron for group in others for neuron in group.ids.tolist()} & set(coming)
    sent = [part for group in groups for part in fetches.land(group.tag, 0)]
    assert [neuron for part in sent for neuron in ids_of(part)] == coming
    again = {neuron for group in begun(fetches) for neuron in group.ids.tolist()}
    assert not again & set(coming), "read twice"


def test_a_whole_layer_is_read_ahead_as_far_as_there_are_slots() -> None:
    """Its demand will name all: there is nothing to doubt, and nothing to learn."""
    fetches = reader(slots=100)
    for step in (1, 2, 3):  # a predictor that names what is not needed
        prefetch(fetches, range(900, 964), step)
        land_all(fetches)
        demand(fetches, [], step)
        fetches.release(step, 1, 0, 0)
    demand(fetches, range(NEURONS), step=4, layer=0)
    fetches.drop(4)
    prefetch(fetches, range(NEURONS), step=5)
    land_all(fetches)
    first = fetches.take(Fetch(9, 5, 1, False, 5, frame(range(NEURONS))), 0)[0]
    assert len(ids_of(first)) == 100, "what was there, and what was read into the other slots"
    assert (first.prefetched, first.left, first.wasted_bytes) == (36, NEURONS - 100, 0)


def early_reader() -> Fetches:
    """Layers 0 and 1 have neurons 0 to 9, and step 2 is at layer 0."""
    fetches = reader(extras="ahead")
    for layer in (0, 1):
        fill(fetches, range(10), 1, layer)
    demand(fetches, range(10), 2, 0)
    return fetches


def test_a_layer_is_begun_with_what_look_ahead_found_before_it_asks() -> None:
    fetches = early_reader()
    prefetch(fetches, [4, 3, 700], 2, 1)
    (group,) = begun(fetches)
    assert fetches.land(group.tag, 0) == []
    (early,) = fetches.release(2, 0, 0, 7)
    assert (early.step, early.layer, early.part, early.left, early.landed_ns) == (2, 1, 0, -1, 7)
    assert ids_of(early) == [4, 3, 700]
    answer = demand(fetches, [3, 5, 700, 800], 2, 1)
    assert (ids_of(answer), answer.part, answer.left) == ([5], 1, 1), "what was sent is not again"
    assert (answer.prefetched, answer.extra, answer.reads) == (1, 1, 1)
    assert fetches.release(2, 1, 0, 0) == []
    (late,) = land_all(fetches)
    assert (ids_of(late), late.part, late.left) == ([800], 2, 0)
    for part in (1, 2):
        assert fetches.release(2, 1, part, 0) == []
    assert not any(pool.pins.any() for pool in fetches.pools)


def test_a_prefetch_that_comes_when_its_layer_has_begun_is_answered_at_once() -> None:
    fetches = early_reader()
    assert fetches.release(2, 0, 0, 0) == []
    (early,) = fetches.take(Fetch(9, 2, 1, True, 5, frame([1, 500])), 0)
    assert (ids_of(early), early.left) == ([1], -1)


@pytest.mark.parametrize("end", ["drop", "next step"])
def test_what_was_sent_early_is_given_back_with_its_step(end: str) -> None:
    fetches = early_reader()
    prefetch(fetches, [4, 3], 2, 1)
    assert fetches.release(2, 0, 0, 0)
    if end == "drop":
        fetches.drop(2)
    else:
        demand(fetches, [], 3, 0)
        fetches.release(3, 0, 0, 0)
        fill(fetches, [], 3, 1)
    assert not any(pool.pins.any() for pool in fetches.pools)


@pytest.mark.parametrize(("extras", "ids"), [("none", [4, 3]), ("ahead", range(NEURONS))])
def test_nothing_is_sent_early(extras: str, ids: object) -> None:
    """Without extras, or of a layer that is needed whole: that streams through its slots."""
    fetches = reader(extras=extras)
    fill(fetches, range(10), 1, 1)
    demand(fetches, range(10), 2, 0)
    prefetch(fetches, ids, 2, 1)
    assert fetches.release(2, 0, 0, 0) == []
