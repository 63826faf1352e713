"""What a wait is charged to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.compute.waits import LayerWaits


def test_each_stretch_is_charged_to_its_cause() -> None:
    waits = LayerWaits(rows=1, asked_ns=100)
    waits.add(since_ns=110, until_ns=200, named_ns=130, taken_ns=140, landed_ns=190)
    assert waits.predictor_ns == 20  # 110 to 130
    assert waits.flash_ns == 50  # 140 to 190
    assert waits.queue_ns == 20  # 130 to 140 and 190 to 200


def test_what_landed_before_it_was_waited_for_is_no_flash_wait() -> None:
    waits = LayerWaits(rows=1, asked_ns=0)
    waits.add(since_ns=100, until_ns=103, named_ns=10, taken_ns=20, landed_ns=90)
    assert (waits.predictor_ns, waits.queue_ns, waits.flash_ns) == (0, 3, 0)


@given(st.lists(st.integers(0, 1000), min_size=5, max_size=5), st.integers(0, 1000))
def test_causes_add_up_to_the_wait(times: list[int], since: int) -> None:
    asked, named, taken, landed, until = sorted(times)
    since = min(since, until)
    waits = LayerWaits(rows=1, asked_ns=asked)
    waits.add(since, until, named, taken, landed)
    assert waits.stall_ns == until - since
