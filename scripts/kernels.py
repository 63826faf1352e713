"""How fast the pieces of a decode step's FFN run here: the reason why ffn.py gathers rows first.

Times, on bundles as they lie in the cache, ways to multiply 400 neurons for one token. Prints
microseconds (medians) and ratios to the first way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

SLOTS, ACTIVE, TURNS, REPEATS = 2000, 400, 9, 10


@click.command()
@click.option("--hidden", default=4096, show_default=True, help="Length of a row.")
@click.option("--threads", default=1, show_default=True)
def main(hidden: int, threads: int) -> None:
    """Time the ways to weight and sum down columns, and the up side beside them."""
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        measure(dtype, hidden)


def measure(dtype: torch.dtype, hidden: int) -> None:
    cache = torch.randn(SLOTS, 2 * hidden).to(dtype)
    up, down = cache[:, :hidden], cache[:, hidden:]
    x, h = torch.randn(hidden).to(dtype), torch.randn(ACTIVE).to(dtype)
    slots, every = torch.randperm(SLOTS)[:ACTIVE], torch.arange(ACTIVE)
    start = torch.zeros(1, dtype=torch.int64)

    def bag(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, rows, start, mode="sum", per_sample_weights=h)

    ways = {
        "down: gather, then embedding_bag": lambda: bag(down.index_select(0, slots), every),
        "down: embedding_bag in place": lambda: bag(down, slots),
        "down: gather, then vector @ matrix": lambda: h @ down.index_select(0, slots),
        "up: gather, then mv": lambda: torch.mv(up.index_select(0, slots), x),
    }
    times = {name: medians(way) for name, way in ways.items()}
    first = next(iter(times.values()))
    for name, us in times.items():
        print(f"{str(dtype)[6:]:9} {name:36} {us:8.0f} µs  {us / first:5.2f}×")


def medians(way: Callable[[], object]) -> float:
    """Median microseconds of a call."""
    found = []
    for _ in range(TURNS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            way()
        found.append((time.perf_counter() - began) / REPEATS * 1e6)
    return statistics.median(found)


if __name__ == "__main__":
    main(prog_name="python -m scripts.kernels")
