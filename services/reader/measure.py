"""How fast the drive gives bundles: `python -m services.reader.measure STORE`, one JSON line.

Random direct reads of the store's own bundle files, as the reader makes them: of one layer at a
time, ascending, so many in flight. A point is a read's size (neighbouring bundles) and a depth. Of
a folder that is no store, a file of random bytes is written there, read, and removed.
A drive, or a host under this machine, may have a cache of its own that nobody here can drop: of a
small store these figures are too good.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError, UserError
from common.limits import ALIGN_BYTES, PROBE_S, READ_BYTES_MAX, READS_IN_FLIGHT_MAX
from common.segment import large_pages
from common.store.manifest import MANIFEST
from common.store.store import Store, forget_pages
from services.reader.aio import WAKE_EVERY, Aio
from services.reader.backends import RECHECK_S, Backend, Memory
from services.reader.reads import Reads
from services.reader.threads import THREADS, Threads

DEPTHS = (1, 8, 32, READS_IN_FLIGHT_MAX)
SECONDS = 0.5
BATCH_READS_MIN = 32  # a batch costs Python time, whatever it holds
BATCHES = 2  # one is read while the other is being taken up
SCRATCH_BYTES = 1 << 30  # of the file that is written where there is no store
SCRATCH_SHARE = 4  # and at most a quarter of what is free
SCRATCH_SIZES = (1, 4, 16, 64, 256)  # pages in a read
BLOCK_BYTES = 16 << 20
LATENCY_READS = 201
WAYS = ("aio", "threads", "buffered")


@dataclass(frozen=True)
class Target:
    """What is read: files of `neurons` bundles each."""

    paths: tuple[Path, ...]
    neurons: int
    stride_bytes: int
    scratch: bool  # it was written for this


@dataclass(frozen=True)
class Point:
    """What the drive gave for reads of one size at one depth."""

    read_bytes: int
    depth: int  # reads in flight at most
    bytes_per_s: float


def read_sizes(target: Target) -> list[int]:
    """Bundles in a read: 1, 2, 4, ... as far as the reader merges them and a layer has them."""
    if target.scratch:
        return list(SCRATCH_SIZES)
    most = min(max(1, READ_BYTES_MAX // target.stride_bytes), target.neurons)
    return [2**power for power in range(most.bit_length())]


def target_of(store: Store) -> Target:
    geometry = store.geometry
    paths = tuple(store.bundle_path(layer) for layer in range(geometry.layers))
    return Target(paths, geometry.neurons, geometry.stride_bytes, scratch=False)


@contextlib.contextmanager
def opened(where: Path) -> Iterator[Target]:
    """The store at `where`, or a scratch file in that folder. `UserError` if there is no room."""
    if (where / MANIFEST).exists() or not where.is_dir():
        yield target_of(Store.open(where))
        return
    size = min(SCRATCH_BYTES, shutil.disk_usage(where).free // SCRATCH_SHARE)
    size -= size % READ_BYTES_MAX
    if size < READ_BYTES_MAX:
        raise UserError(f"{where} has no room for a file to read: free some space")
    with tempfile.NamedTemporaryFile(prefix="inflash-probe-", dir=where) as file:
        random = np.random.default_rng(0)
        for first in range(0, size, BLOCK_BYTES):
            file.write(random.bytes(min(BLOCK_BYTES, size - first)))
        file.flush()
        os.fsync(file.fileno())
        forget_pages(file.fileno())
        yield Target((Path(file.name),), size // ALIGN_BYTES, ALIGN_BYTES, scratch=True)


def measure(
    target: Target, bundles: int, depth: int, seconds: float = SECONDS, way: str | None = None
) -> Point:
    """Reads at random for `seconds`. `StoreError` if the drive gives an error, `OSError` if it
    cannot be read in that way.

    Args:
        bundles: in one read, neighbours.
        depth: reads in flight; where only threads can read, they are as many as there are threads.
        way: one of WAYS; None: the best that works.
    """
    count = max(depth, BATCH_READS_MIN)
    size = BATCHES * count * bundles * target.stride_bytes
    # As the cache lies: into pages of 4 KB a drive may give half as much (docs/measurements.md).
    memory = large_pages(size).reshape(-1, target.stride_bytes)
    memory[:] = 1  # its pages are there before the clock runs
    backend, depth = _open(target, memory, depth, way)
    try:
        draw = _Draw(target, bundles, count, depth)
        start = time.perf_counter()
        done = _read(backend, draw, start + seconds)
        took = time.perf_counter() - start
    finally:
        backend.close()
    return Point(bundles * target.stride_bytes, depth,
                 done * count * bundles * target.stride_bytes / took)  # fmt: skip


def _open(target: Target, memory: Memory, depth: int, way: str | None) -> tuple[Backend, int]:
    """A way of reading and its depth; of None the way that takes a depth, or else the one that
    works anywhere."""
    if way in (None, "aio"):
        try:
            return Aio(target.paths, memory, depth), depth
        except OSError:
            if way:
                raise
    return Threads(target.paths, memory, direct=way != "buffered"), THREADS


def median_point(target: Target, bundles: int, depth: int, seconds: float, rounds: int) -> Point:
    """The median of so many measurements, `seconds` each: a shared drive has bad moments."""
    points = [measure(target, bundles, depth, seconds) for _ in range(rounds)]
    return sorted(points, key=lambda point: point.bytes_per_s)[rounds // 2]


def latency_us(target: Target) -> float | None:
    """A read of one page, alone; median. None where the drive's files cannot be read directly."""
    if not hasattr(os, "O_DIRECT"):
        return None
    page = mmap.mmap(-1, ALIGN_BYTES)
    random = np.random.default_rng(0)
    try:
        file = os.open(target.paths[0], os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        times = []
        for place in random.integers(0, target.neurons, LATENCY_READS).tolist():
            began = time.perf_counter()
            os.preadv(file, [page], place * target.stride_bytes)
            times.append(time.perf_counter() - began)
    finally:
        os.close(file)
    return float(np.median(times) * 1e6)


def compare_ways(target: Target, seconds: float) -> dict[str, float | str]:
    """Bytes per second of single bundles at the reader's depth, by way; or why it is refused."""
    found: dict[str, float | str] = {}
    bundles = 1 if not target.scratch else SCRATCH_SIZES[1]
    for way in WAYS:
        try:
            point = measure(target, bundles, READS_IN_FLIGHT_MAX, seconds, way)
            found[way] = point.bytes_per_s
        except OSError as error:
            found[way] = error.strerror or str(error)
    return found


class _Draw:
    """Draws batches: a layer, and `count` reads of it, each of `bundles` neighbours."""

    def __init__(self, target: Target, bundles: int, count: int, depth: int):
        self._target, self._bundles, self._count = target, bundles, count
        # So few in flight end without a signal, and the next would begin a whole recheck later.
        self.patience_s = RECHECK_S if depth > WAKE_EVERY else 0.0
        self._random = np.random.default_rng(0)

    def batch(self, place: int) -> tuple[int, Reads]:
        """A batch that is read into the place `place` of BATCHES."""
        bundles, count, stride = self._bundles, self._count, self._target.stride_bytes
        choices = self._target.neurons // bundles
        chosen = self._random.choice(choices, count, replace=count > choices)
        offsets = np.sort(chosen).astype(np.int64) * bundles * stride
        slots = np.arange(count * bundles) + place * count * bundles
        layer = int(self._random.integers(len(self._target.paths)))
        return layer, Reads(offsets, np.arange(count + 1) * bundles, slots, stride)


def _read(backend: Backend, draw: _Draw, deadline: float) -> int:
    """Keeps BATCHES batches with the backend until the deadline, then waits for the last ones.
    Returns how many were read."""
    for place in range(BATCHES):
        backend.submit(place, *draw.batch(place))
    under_way, done, came = BATCHES, 0, time.perf_counter()
    while under_way:
        select.select([backend.fileno()], [], [], draw.patience_s)
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
    parser.add_argument("where", type=Path, help="a store, or a folder of the drive")
    parser.add_argument("--depth", type=int, action="append", help="may be repeated")
    parser.add_argument("--bundles", type=int, action="append", help="in a read; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each pair of the two")
    parser.add_argument("--ways", action="store_true", help="each way of reading, compared")
    parser.add_argument("--rounds", type=int, default=1, help="of each; their median is printed")
    parser.add_argument("--latency", action="store_true", help="of one read alone, too")
    given = parser.parse_args(arguments)
    try:
        with opened(given.where) as target:
            pairs = itertools.product(given.bundles or read_sizes(target), given.depth or DEPTHS)
            points = [
                asdict(median_point(target, *pair, given.seconds, given.rounds)) for pair in pairs
            ]
            found: dict[str, Any] = {"stride_bytes": target.stride_bytes, "points": points}
            if given.ways:
                found["ways"] = compare_ways(target, given.seconds * given.rounds)
            if given.latency:
                found["latency_us"] = latency_us(target)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
