"""How far down a prefetch is read: as far as it was of use lately."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.reader.useful import CLASSES, LOOK_EVERY, Usefulness

COUNT = 320


def feed(
    useful: Usefulness, layer: int, share_of: Any, prefetches: int, busy: float = 1.0
) -> list[int]:
    """Reads what is worth it of so many prefetches; class c is demanded with share_of[c]."""
    rng, read = np.random.default_rng(0), []
    for _ in range(prefetches):
        worth = useful.worth(layer, COUNT, busy)
        places = rng.permutation(worth)
        chance = share_of[places * CLASSES // COUNT]
        useful.learn(layer, places, COUNT, rng.random(worth) < chance)
        read.append(worth)
    return read


def test_all_is_read_while_nothing_is_known() -> None:
    assert Usefulness(2).worth(1, COUNT, 1.0) == COUNT
    assert Usefulness(1).worth(0, 0, 1.0) == 0


def test_it_is_read_as_far_as_it_was_of_use() -> None:
    useful = Usefulness(2)
    falling = np.where(np.arange(CLASSES) < CLASSES // 2, 0.7, 0.2)
    read = feed(useful, 0, falling, 400)
    assert read[0] == COUNT
    late = read[-200:]
    assert late.count(COUNT) == 200 // LOOK_EVERY, "one of so many looks at all"
    cut = [worth for worth in late if worth < COUNT]
    assert all(0.4 * COUNT < worth < 0.6 * COUNT for worth in cut)
    assert useful.worth(1, COUNT, 1.0) == COUNT, "the other layer is another matter"


def test_a_drive_that_has_time_reads_further_down() -> None:
    falling = np.linspace(1.0, 0.0, CLASSES)
    medians = []
    for busy in (1.0, 0.25, 0.0):
        read = feed(Usefulness(1), 0, falling, 1000, busy)
        medians.append(float(np.median(read[-400:])) / COUNT)
    # Where the chance falls below 1/2, 1/5 and nothing.
    assert abs(medians[0] - 0.5) < 0.15
    assert abs(medians[1] - 0.8) < 0.15
    assert medians[2] == 1


def test_what_becomes_useful_is_read_again() -> None:
    useful = Usefulness(1)
    feed(useful, 0, np.where(np.arange(CLASSES) < 4, 1.0, 0.0), 300)
    assert useful.worth(0, COUNT, 1.0) == COUNT // 4
    read = feed(useful, 0, np.ones(CLASSES), 400)
    assert set(read[-50:]) == {COUNT}
