"""Ways to do the same, timed by turns: what the machine does meanwhile falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def median_us(ways: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Microseconds of each way, medians. A first turn, in which kernels and memory are made, does
    not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}
