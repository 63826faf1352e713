"""Products with rows that lie in the cache: gathered by slot, multiplied, in bounded chunks.

A row is one part of one bundle, [hidden]. Rows are gathered before they are multiplied: `mv` over
rows that are not contiguous copies them one by one. The number of rows differs in every layer of
every token, and oneDNN makes and keeps a kernel for each number that it meets: so chunks have few
sizes, and what a chunk has too many is multiplied and not looked at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.store.geometry import Geometry

CHUNK_ROWS = 512
CHUNK_STEP = 32  # chunks have a multiple of so many rows


class CacheRows:
    """The rows of `cache` [slots, stride items]."""

    def __init__(self, cache: torch.Tensor, geometry: Geometry, dtype: torch.dtype):
        """`dtype` is what products are made in."""
        self._hidden = geometry.hidden
        self._dtype = dtype
        self._place = {name: i for i, name in enumerate(geometry.parts)}
        self._cache = cache
        # Where bundles are a whole number of rows apart, all rows are one contiguous matrix, which
        # is gathered from faster, and which embedding_bag takes as it is.
        per_slot, rest = divmod(cache.shape[1], geometry.hidden)
        self._per_slot = per_slot
        self._matrix = None if rest else cache.view(-1, geometry.hidden)
        chunk = min(CHUNK_ROWS, -(-geometry.neurons // CHUNK_STEP) * CHUNK_STEP)
        self._chunk = torch.zeros(chunk, geometry.hidden, dtype=cache.dtype)

    def gather(self, part: str, slots: torch.Tensor) -> torch.Tensor:
        """One part of the bundles in `slots` int64 [count]: [count, hidden], in the products'
        dtype."""
        return self._gather(part, slots, None).to(self._dtype)

    def dot(self, part: str, slots: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The products of those rows with `x` [hidden]: float32 [count]."""
        size, count = len(self._chunk), len(slots)
        out = torch.empty(-(-count // CHUNK_STEP) * CHUNK_STEP, dtype=self._dtype)
        for first in range(0, count, size):
            some = slots[first : first + size]
            rows = -(-len(some) // CHUNK_STEP) * CHUNK_STEP
            self._gather(part, some, self._chunk[: len(some)])
            torch.mv(self._chunk[:rows].to(self._dtype), x, out=out[first : first + rows])
        return out[:count].float()

    def sum(self, part: str, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Those rows, each times its weight, float32 [count], and added: float32 [hidden]."""
        # The weights may be more than half precision can hold, and all of them may be 0.
        scale = weights.abs().max().clamp_min(torch.finfo(weights.dtype).tiny)
        weights = (weights / scale).to(self._dtype)
        start = torch.zeros(1, dtype=torch.int64)
        if self._matrix is not None and self._dtype == self._matrix.dtype:
            index, rows = slots * self._per_slot + self._place[part], self._matrix
        else:
            index, rows = torch.arange(len(slots)), self.gather(part, slots)
        sums = F.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weights)
        return sums[0].float() * scale

    def _gather(self, part: str, slots: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        place = self._place[part]
        if self._matrix is not None:
            index = slots * self._per_slot + place
            return torch.index_select(self._matrix, 0, index, out=out)
        rows = self._cache[:, place * self._hidden : (place + 1) * self._hidden]
        return torch.index_select(rows, 0, slots, out=out)
