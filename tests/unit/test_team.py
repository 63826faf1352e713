"""A team's threads share work, pass errors on, and end with it."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from services.compute.team import Team

NAME = "test-team"


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_all_take_part_and_each_piece_is_done_once() -> None:
    team, done, seen = Team(3, NAME), [], set()
    for _ in range(50):
        pieces, together = iter(range(100)), threading.Barrier(4)

        def take(pieces=pieces, together=together) -> None:  # type: ignore[no-untyped-def]
            together.wait(10)
            seen.add(threading.get_ident())
            for piece in pieces:
                done.append(piece)

        team.call(take)
    assert sorted(done) == sorted([*range(100)] * 50)
    assert len(seen) == 4


@pytest.mark.parametrize("helper", [True, False])
def test_an_error_comes_through_and_the_team_goes_on(helper: bool) -> None:
    team, asking = Team(1, NAME), threading.get_ident()

    def fail() -> None:
        if (threading.get_ident() != asking) == helper:
            raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            team.call(fail)
    done: list[int] = []
    team.call(lambda: done.append(1))
    assert len(done) == 2


def test_threads_end_with_their_team() -> None:
    name = f"{NAME}-ends"  # not that of the others, some of whose may be ending
    team = Team(2, name)
    team.call(lambda: None)
    assert threads(name) == 2
    del team
    gc.collect()
    deadline = time.monotonic() + 10
    while threads(name):
        assert time.monotonic() < deadline
        time.sleep(0.01)
