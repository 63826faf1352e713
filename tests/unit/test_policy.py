"""The cache policies and the eviction, pure functions: by example and by property."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy import NEVER_USED, Decay, Policy, Window, evict, make_policy

NOW = 1000


def given_up(ages: list[int], held: list[int], window: int | None, want: int) -> set[int]:
    """What is given up of slots whose neurons were last used `ages` tokens ago."""
    mask = np.isin(np.arange(len(ages)), held)
    slots = evict(NOW - np.array(ages, np.float64), mask, Window(window).floor(NOW), want)
    assert slots.dtype == np.int64
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


@pytest.mark.parametrize("policy", [Window(None), Window(3), Decay()])
def test_what_no_token_has_used_leaves_first(policy: Policy):
    keys = policy.used(np.full(3, NEVER_USED), 1)
    keys[1] = NEVER_USED
    assert evict(keys, np.zeros(3, np.bool_), policy.floor(1), 1).tolist() == [1]


def uses(policy: Policy, tokens: list[int]) -> float:
    """The key of a neuron that was used in these tokens."""
    key = np.array([NEVER_USED])
    for token in tokens:
        key = policy.used(key, token)
    return float(key[0])


def test_a_window_sees_the_last_use_and_decay_all_of_them():
    often, lately = [1, 2, 3, 4, 5], [6]
    assert uses(Window(None), often) < uses(Window(None), lately)
    assert uses(Decay(), often) > uses(Decay(), lately)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=20).map(sorted))
def test_decay_halves_every_half_life(tokens: list[int]):
    policy, now = Decay(), tokens[-1]
    count = 2 ** (uses(policy, tokens) - now / policy.half_life)
    expected = math.fsum(2 ** ((token - now) / policy.half_life) for token in tokens)
    assert count == pytest.approx(expected)


def test_the_settings_choose():
    assert make_policy("decay", None) == Decay()
    assert make_policy("window", 7) == Window(7)
    assert make_policy("window", None) == Window(None)
    assert make_policy("auto", None) == Decay()
    assert make_policy("auto", 7) == Window(7)


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
