"""How fast the drive gives a store's bundles: `python -m services.reader.measure STORE`, one JSON
line.

Random direct reads of the store's own bundle files, as the reader makes them: of one layer at a
time, ascending, so many in flight. A point is a read's size (neighbouring bundles) and a depth.
A drive, or a host under this machine, may have a cache of its own that nobody here can drop: of a
small store these figures are too good.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.errors import StoreError, UserError
from common.limits import PROBE_S, READ_BYTES_MAX, READS_IN_FLIGHT_MAX
from common.store.geometry import Geometry
from common.store.store import Store
from services.reader.aio import Aio
from services.reader.backends import RECHECK_S, Backend, Memory
from services.reader.reads import Reads
from services.reader.threads import THREADS, Threads

DEPTHS = (1, 8, 32, READS_IN_FLIGHT_MAX)
SECONDS = 0.5
BATCH_READS_MIN = 32  # a batch costs Python time, whatever it holds
BATCHES = 2  # one is read while the other is being taken up


@dataclass(frozen=True)
class Point:
    """What the drive gave for reads of one size at one depth."""

    read_bytes: int
    depth: int  # reads in flight at most
    bytes_per_s: float


def read_sizes(geometry: Geometry) -> list[int]:
    """Bundles in a read: 1, 2, 4, ... as far as the reader merges them and a layer has them."""
    most = min(max(1, READ_BYTES_MAX // geometry.stride_bytes), geometry.neurons)
    return [2**power for power in range(most.bit_length())]


def measure(store: Store, bundles: int, depth: int, seconds: float = SECONDS) -> Point:
    """Reads at random for `seconds`. `StoreError` if the drive gives an error.

    Args:
        bundles: in one read, neighbours.
        depth: reads in flight; where only threads can read, they are as many as there are threads.
    """
    geometry = store.geometry
    count = max(depth, BATCH_READS_MIN)
    size = BATCHES * count * bundles * geometry.stride_bytes
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(-1, geometry.stride_bytes)
    memory[:] = 1  # its pages are there before the clock runs
    backend, depth = _open(store, memory, depth)
    try:
        draw = _Draw(geometry, bundles, count)
        start = time.perf_counter()
        done = _read(backend, draw, start + seconds)
        took = time.perf_counter() - start
    finally:
        backend.close()
    return Point(bundles * geometry.stride_bytes, depth,
                 done * count * bundles * geometry.stride_bytes / took)  # fmt: skip


def _open(store: Store, memory: Memory, depth: int) -> tuple[Backend, int]:
    """The way of reading that takes a depth, or else the one that works anywhere; and its depth."""
    paths = [store.bundle_path(layer) for layer in range(store.geometry.layers)]
    try:
        return Aio(paths, memory, depth), depth
    except OSError:
        return Threads(paths, memory, direct=True), THREADS


class _Draw:
    """Draws batches: a layer, and `count` reads of it, each of `bundles` neighbours."""

    def __init__(self, geometry: Geometry, bundles: int, count: int):
        self._geometry, self._bundles, self._count = geometry, bundles, count
        self._random = np.random.default_rng(0)

    def batch(self, place: int) -> tuple[int, Reads]:
        """A batch that is read into the place `place` of BATCHES."""
        bundles, count, stride = self._bundles, self._count, self._geometry.stride_bytes
        choices = self._geometry.neurons // bundles
        chosen = self._random.choice(choices, count, replace=count > choices)
        offsets = np.sort(chosen).astype(np.int64) * bundles * stride
        slots = np.arange(count * bundles, dtype=np.int32) + place * count * bundles
        layer = int(self._random.integers(self._geometry.layers))
        return layer, Reads(offsets, np.arange(count + 1) * bundles, slots, stride)


def _read(backend: Backend, draw: _Draw, deadline: float) -> int:
    """Keeps BATCHES batches with the backend until the deadline, then waits for the last ones.
    Returns how many were read."""
    for place in range(BATCHES):
        backend.submit(place, *draw.batch(place))
    under_way, done, came = BATCHES, 0, time.perf_counter()
    while under_way:
        select.select([backend.fileno()], [], [], RECHECK_S)
        completions = backend.completed()
        if completions:
            came = time.perf_counter()
        elif time.perf_counter() > came + PROBE_S:
            raise StoreError(f"the drive gave nothing for {PROBE_S:.0f} s (limit PROBE_S)")
        for completion in completions:
            if completion.error:
                raise StoreError(f"a read failed: {completion.error}")
            done += 1
            under_way -= 1
            if time.perf_counter() < deadline:
                backend.submit(completion.tag, *draw.batch(completion.tag))
                under_way += 1
    return done


def main(arguments: Sequence[str]) -> int:
    """The program. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--depth", type=int, action="append", help="may be repeated")
    parser.add_argument("--bundles", type=int, action="append", help="in a read; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each pair of the two")
    given = parser.parse_args(arguments)
    try:
        store = Store.open(given.store)
        pairs = itertools.product(
            given.bundles or read_sizes(store.geometry), given.depth or DEPTHS
        )
        points = [measure(store, *pair, given.seconds) for pair in pairs]
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    stride = store.geometry.stride_bytes
    print(json.dumps({"stride_bytes": stride, "points": [asdict(point) for point in points]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
