"""The eviction policy, a pure function: by example and by property."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.reader.evict import evict


def given_up(ages: list[int], held: list[int], window: int | None, want: int) -> set[int]:
    """What is given up of slots that were last used `ages` tokens ago."""
    now = 1000
    mask = np.isin(np.arange(len(ages)), held)
    slots = evict(now - np.array(ages, np.int64), mask, now, window, want)
    assert slots.dtype == np.int32
    assert len(set(slots.tolist())) == len(slots)
    return set(slots.tolist())


def test_auto_gives_up_nothing_unless_room_is_wanted():
    assert given_up([0, 50, 900], [], None, 0) == set()


def test_auto_gives_up_the_least_recently_used():
    assert given_up([3, 9, 1, 7], [], None, 2) == {1, 3}


def test_what_left_the_window_leaves_without_being_asked():
    assert given_up([0, 2, 3, 9], [], 2, 0) == {2, 3}


def test_the_window_stays_while_others_make_room():
    assert given_up([0, 2, 3, 9], [], 2, 2) == {2, 3}


def test_the_oldest_of_the_window_makes_room_if_it_must():
    assert given_up([0, 2, 1, 9], [], 2, 2) == {3, 1}


def test_what_is_held_stays():
    assert given_up([5, 6, 7, 8], [2, 3], 1, 4) == {0, 1}


def test_there_may_be_nothing_to_give():
    assert given_up([5, 6], [0, 1], 1, 1) == set()
    assert given_up([], [], None, 3) == set()


@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=40),
    st.none() | st.integers(1, 20),
    st.integers(0, 50),
)
def test_properties(slots: list[tuple[int, bool]], window: int | None, want: int) -> None:
    ages = [age for age, _ in slots]
    held = {i for i, (_, is_held) in enumerate(slots) if is_held}
    gone = given_up(ages, sorted(held), window, want)
    stay = set(range(len(slots))) - gone - held
    outside = {i for i in range(len(slots)) if window is not None and ages[i] > window} - held
    assert not gone & held, "nothing held leaves"
    assert outside <= gone, "what left the window leaves"
    assert len(gone) == min(max(want, len(outside)), len(slots) - len(held)), "no more than that"
    assert all(ages[g] >= ages[s] for g in gone for s in stay), "the longest unused go first"
