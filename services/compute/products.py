"""The kernels of common/kernels.py over torch's tensors, by as many threads as torch has.

A product is cut into blocks that the threads take one after another: where another process has
taken a core, the thread on the other core takes more of them. No thread spins between products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.kernels import BITS
from common.packed import add_rows, dot_rows, pack_rows, scales_of, widen_rows
from common.store.geometry import GROUP

Bits = npt.NDArray[Any]
Starts = npt.NDArray[np.int64]

BLOCKS_PER_THREAD = 4
SHARED_BYTES_MIN = 2 << 20  # what takes less time than 0.2 ms is not worth waking a thread for


class Products:
    """Products with rows that begin anywhere in a contiguous array of numbers."""

    def __init__(self, threads: int) -> None:
        self._helpers = threads - 1
        self._pool = ThreadPoolExecutor(threads - 1, "products") if threads > 1 else None

    def dot(self, items: Bits, starts: Starts, x: torch.Tensor) -> torch.Tensor:
        """The product of each row with `x` float32 [width]: float32 [rows]."""
        out = np.empty(len(starts), np.float32)
        vector = x.numpy()

        def multiply(first: int, end: int) -> None:
            dot_rows(items, starts[first:end], vector, out[first:end])

        self._share(len(starts), len(starts) * len(vector) * items.itemsize, multiply)
        return torch.from_numpy(out)

    def add(self, items: Bits, starts: Starts, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out += the rows, each times its weight: `weights` float32 [rows], `out` float32
        [width]. Threads share the width, so that none adds where another does."""
        sums, scale = out.numpy(), weights.numpy()
        if items.dtype == np.int8:
            scale = scale * scales_of(items, starts)

        def add(first: int, end: int) -> None:
            add_rows(items, starts, scale, len(sums), first, sums[first:end])

        self._share(len(sums), len(starts) * len(sums) * items.itemsize, add)

    def widen(self, items: Bits, starts: Starts, out: torch.Tensor) -> None:
        """Fills `out` float32 [rows, width] with the rows."""
        rows = out.numpy()

        def widen(first: int, end: int) -> None:
            widen_rows(items, starts[first:end], rows[first:end])

        self._share(len(starts), len(starts) * rows.shape[1] * items.itemsize, widen)

    def pack(self, rows: npt.NDArray[np.float32], items: Bits, starts: Starts) -> None:
        """Packs `rows` float32 [rows, width] into `items`: row i begins at starts[i]."""

        def pack(first: int, end: int) -> None:
            pack_rows(rows[first:end], items, starts[first:end])

        self._share(len(rows), rows.nbytes, pack)

    def _share(self, count: int, size_bytes: int, work: Callable[[int, int], None]) -> None:
        """Does `work` for all of `count` items, in blocks, by all threads."""
        if self._pool is None or size_bytes < SHARED_BYTES_MIN:
            work(0, count)
            return
        step = -(-count // (BLOCKS_PER_THREAD * (self._helpers + 1)))
        step = -(-step // GROUP) * GROUP  # whole groups, and whole cache lines of float32
        blocks = iter(range(0, count, step))
        others = [self._pool.submit(_take, blocks, step, count, work) for _ in range(self._helpers)]
        _take(blocks, step, count, work)
        for other in others:
            other.result()


def _take(blocks: Iterator[int], step: int, count: int, work: Callable[[int, int], None]) -> None:
    """Works while there are blocks. Taking one is a single step of the interpreter."""
    for first in blocks:
        work(first, min(first + step, count))


def bits_of(values: torch.Tensor) -> Bits:
    """The numbers of a contiguous tensor as the kernels take them, flat, not copied."""
    name = str(values.dtype).removeprefix("torch.")
    flat = values.detach().view(-1)  # no copy: raises for what is not contiguous
    if values.element_size() == 2:
        flat = flat.view(torch.int16)
    return flat.numpy().view(BITS[name])
