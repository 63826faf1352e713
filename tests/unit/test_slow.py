"""The setting `slow`: what it takes, and that a slowed backend is late and otherwise right."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from common.slow import Slow, parse_slow
from services.reader.reads import plan_reads
from services.reader.slowed import Slowed
from services.reader.threads import Threads

STRIDE = 4096


def test_what_is_said() -> None:
    assert parse_slow("reads:1%:20ms") == Slow(reads_share=0.01, reads_s=0.02)
    assert parse_slow("predictor:2.5ms, reads:100%:5ms") == Slow(1.0, 0.005, 0.0025)


@pytest.mark.parametrize(
    "text",
    ["", "reads", "reads:1%", "reads:101%:5ms", "reads:1%:10001ms", "predictor:5s",
     "predictor:1001ms", "reader:1%:5ms"],
)  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ms"):
        parse_slow(text)


def test_every_so_many_batches_are_late_and_all_are_right(tmp_path: Path) -> None:
    path = tmp_path / "bundles"
    stored = np.random.default_rng(0).integers(0, 256, (8, STRIDE), np.uint8)
    path.write_bytes(stored.tobytes())
    memory = np.zeros((8, STRIDE), np.uint8)
    now = 0.0
    backend = Slowed(Threads([path], memory, direct=False), Slow(0.25, 10.0), lambda: now)
    for tag in range(8):
        ids = np.array([tag], np.int32)
        backend.submit(tag, 0, plan_reads(ids, ids, STRIDE))
    told: set[int] = set()
    deadline = time.monotonic() + 10
    while len(told) < 6:
        told |= {completion.tag for completion in backend.completed()}
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert told == {0, 1, 2, 4, 5, 6}
    now = 11.0
    while len(told) < 8:
        told |= {completion.tag for completion in backend.completed()}
        assert time.monotonic() < deadline
        now += 11.0
    backend.close()
    assert (memory == stored).all()
