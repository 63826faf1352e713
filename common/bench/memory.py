"""How fast this machine reads weights from memory: `python -m common.bench.memory`, one JSON line.

Matrices that together are far larger than the last-level cache are multiplied with a vector, on all
cores, in each number format; the fastest is the machine's bandwidth. A program of its own: torch's
threads and gigabytes of matrices end with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common.cgroup import machine_bytes

CACHE_FACTOR = 4  # matrices are so many times the last-level cache
BYTES_MIN = 1 << 30
MACHINE_SHARE = 4  # and at most a quarter of memory
WIDTH = 4096  # columns of a matrix, and rows
PASSES = 5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(folder: Path = _CACHES) -> int | None:
    """Size of the largest cache in front of memory; None if the system does not say."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size), default=None)


def matrices_bytes(cache_bytes: int | None, memory_bytes: int) -> int:
    """Bytes of matrices to multiply: well beyond the cache, as far as memory has room."""
    wanted = max(BYTES_MIN, CACHE_FACTOR * (cache_bytes or 0))
    return min(wanted, memory_bytes // MACHINE_SHARE)


def measure(total_bytes: int) -> dict[str, float]:
    """Bytes per second of the best of PASSES passes, by how matrices were multiplied."""
    # Not zeros: memory that was never written is one page. 1.0 is a sound number in all formats.
    weights = torch.full((total_bytes // 2,), 1.0, dtype=torch.float16)
    return {f"mv of {_name(dtype)}": _measure(weights.view(dtype)) for dtype in DTYPES}


def _measure(weights: torch.Tensor) -> float:
    rows = min(WIDTH, weights.numel() // WIDTH)
    count = weights.numel() // (rows * WIDTH)
    matrices = weights[: count * rows * WIDTH].view(count, rows, WIDTH)
    vector = torch.full((WIDTH,), 1.0 / WIDTH, dtype=weights.dtype)

    def multiply() -> None:
        for matrix in matrices:
            torch.mv(matrix, vector)

    return matrices.nbytes / min(_seconds(multiply for _ in range(PASSES)))


def _seconds(actions: Iterable[Callable[[], None]]) -> list[float]:
    times = []
    for action in actions:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bytes", type=int, default=None, help="of matrices")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    cache_bytes = last_level_cache_bytes()
    total = given.bytes or matrices_bytes(cache_bytes, machine_bytes())
    ways = measure(total)
    way = max(ways, key=lambda name: ways[name])
    found = {"bytes_per_s": ways[way], "way": way, "ways": ways, "matrices_bytes": total,
             "last_level_cache_bytes": cache_bytes, "threads": given.threads}  # fmt: skip
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
