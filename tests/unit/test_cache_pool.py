"""A pool of slots, by example: whose neuron leaves, and how slots leave and come back."""

from __future__ import annotations

import numpy as np
import pytest

from common.policy import Decay, Policy, Window
from services.reader.cache import EVICT_AMONG, Pool, among, make_pools, resize

NEURONS = 1000


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def pool_of(slots: int, policy: Policy | None = None) -> Pool:
    return Pool(range(1), NEURONS, range(slots), policy or Window(None))


def bring(pool: Pool, now: int, *numbers: int) -> None:
    """Brings neurons in that token `now` uses."""
    slots = pool.claim(0, ids(*numbers))
    pool.use(0, ids(*numbers), now)
    pool.land(slots)
    pool.unpin(slots)


def resident(pool: Pool) -> list[int]:
    return pool.residents(0).tolist()


def test_a_neuron_that_comes_back_has_the_count_that_it_left_with():
    pool = pool_of(1, Decay(half_life=8))
    bring(pool, 1, 7)
    bring(pool, 2, 8)
    assert resident(pool) == [8]
    bring(pool, 9, 7)
    assert 2 ** (pool.keys[7] - 9 / 8) == pytest.approx(1.5), "its use of 8 tokens ago is half one"


def test_a_small_pool_gives_up_what_it_must():
    pool = pool_of(640)
    bring(pool, 1, *range(640))
    bring(pool, 2, 700)
    assert (pool.evictions, pool.resident) == (1, 640)


def test_of_a_large_pool_those_leave_that_were_used_least():
    """Among those that are looked at, which are others each time."""
    pool = pool_of(EVICT_AMONG * 20)
    bring(pool, 1, *range(len(pool)))
    often = range(0, len(pool), 2)
    pool.use(0, ids(*often), 2)
    for now, neuron in enumerate(range(len(pool), len(pool) + 100), 3):
        bring(pool, now, neuron)
    assert (pool.evictions, pool.resident) == (100, len(pool))
    assert set(often) <= set(resident(pool))


@pytest.mark.parametrize("want", [1, 3])
def test_where_those_that_are_looked_at_are_held_others_leave(want: int):
    pool = pool_of(EVICT_AMONG * 20)
    bring(pool, 1, *range(len(pool)))
    free = list(range(len(pool) - want, len(pool)))
    pool.pin(0, ids(*range(len(pool) - want)))
    bring(pool, 2, *range(len(pool), len(pool) + want))
    assert pool.resident == len(pool)
    assert not set(free) & set(resident(pool))


def stream(pool: Pool, layer: int, *numbers: int) -> None:
    """Brings neurons of a layer that streams."""
    slots = pool.claim(layer, ids(*numbers), streams=True)
    pool.land(slots)
    pool.unpin(slots)


def test_what_streams_stays_while_there_are_free_slots_then_passes():
    pool = Pool(range(2), NEURONS, range(10), Window(None))
    bring(pool, 1, 0, 1, 2, 3)
    stream(pool, 1, *range(6))
    assert (pool.residents(1).tolist(), pool.evictions) == (list(range(6)), 0)
    for first in range(6, 60, 2):
        stream(pool, 1, first, first + 1)
    assert pool.evictions == pool.room() - pool.resident == 2, "those passed their slots on"
    bring(pool, 2, 8, 9)
    stream(pool, 1, 60)
    bring(pool, 3, 10)
    assert 60 not in pool.residents(1), "it passed, though what passed before it was gone"
    assert (pool.evictions, pool.resident) == (3, 10)


def test_a_passing_slot_that_another_holds_is_free_when_that_is_over():
    pool = Pool(range(2), NEURONS, range(2), Window(None))
    bring(pool, 1, 0, 1)
    slots = pool.claim(1, ids(5), streams=True)
    pool.land(slots)
    held = pool.pin(1, ids(5))
    pool.unpin(slots)
    assert pool.residents(1).tolist() == [5]
    pool.unpin(held)
    assert pool.residents(1).tolist() == []


def test_what_was_claimed_to_pass_and_never_came_passes_its_slot_on():
    pool = Pool(range(2), NEURONS, range(10), Window(None))
    bring(pool, 1, *range(10))
    for first in range(0, 20, 2):
        pool.fail(pool.claim(1, ids(first, first + 1), streams=True))
        stream(pool, 1, first, first + 1)
    assert (pool.evictions, pool.residents(1).tolist()) == (2, [])


def test_a_pool_of_one_layer_keeps_what_streams():
    pool = pool_of(10)
    stream(pool, 0, *range(10))
    stream(pool, 0, *range(10, 14))
    assert (pool.evictions, pool.resident) == (4, 10)


def test_what_is_withdrawn_is_free_slots_first_then_the_longest_unused():
    pool = pool_of(6)
    bring(pool, 1, 1)
    bring(pool, 2, 2, 3)
    assert sorted(pool.withdraw(3)) == [3, 4, 5]
    assert resident(pool) == [1, 2, 3]
    assert pool.withdraw(1).tolist() == [0], "the slot of 1"
    assert resident(pool) == [2, 3]
    assert (pool.usable, pool.room()) == (2, 2)
    assert len(pool.withdraw(9)) == 1, "one slot stays in use"
    assert len(pool.withdraw(9)) == 0


def test_what_is_held_is_not_withdrawn():
    pool = pool_of(4)
    loading = pool.claim(0, ids(1, 2, 3))
    assert pool.withdraw(4).tolist() == [3]
    pool.land(loading)
    assert len(pool.withdraw(4)) == 0
    pool.unpin(loading)
    assert len(pool.withdraw(4)) == 2


def test_what_is_withdrawn_is_not_claimed_until_it_is_restored():
    pool = pool_of(4)
    gone = set(pool.withdraw(2).tolist())
    bring(pool, 1, 1, 2)
    bring(pool, 2, 3, 4)
    assert not gone & set(pool.slot_of[[3, 4]].tolist())
    assert set(pool.restore(5).tolist()) == gone
    bring(pool, 3, 5, 6)
    assert set(pool.slot_of[[5, 6]].tolist()) == gone, "free slots first"
    assert resident(pool) == [3, 4, 5, 6]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resize_shares_out(scope: str):
    pools = make_pools(NEURONS, (100, 100, 50), Window(None), scope)
    each = list(dict.fromkeys(pools))
    change = resize(each, 125, 2)
    assert sum(pool.usable for pool in each) == 125
    assert len(set(change.withdrawn.tolist())) == 125
    assert len(change.restored) == 0
    if scope == "layer":
        assert [pool.usable for pool in each] == [50, 50, 25]
    back = resize(each, 250, 2)
    assert set(back.restored.tolist()) == set(change.withdrawn.tolist())
    assert set(back.restored.tolist()) <= set(range(250)), "slots of the whole cache"
    assert len(back.withdrawn) == 0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resize_keeps_the_least(scope: str):
    pools = make_pools(NEURONS, (100, 100, 1), Window(None), scope)
    each = list(dict.fromkeys(pools))
    resize(each, 0, 2)
    assert [pool.usable for pool in each] == ([2, 2, 1] if scope == "layer" else [6])
    resize(each, 10_000, 2)
    assert sum(pool.usable for pool in each) == 201


def test_among():
    assert among(ids(1, 5, 9), ids(9, 0, 1), NEURONS).tolist() == [True, False, True]
    assert among(ids(), ids(1), NEURONS).tolist() == []
