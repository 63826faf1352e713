"""The rows that lie in the cache, by slot: what a layer multiplies, where the reader put it.

A row is one part of one bundle, [hidden]. All products are float32, whatever the rows are; packed
ones are multiplied as they are packed.
"""

from __future__ import annotations

import numpy as np
import torch

from common.firing import starts_of
from common.kernels import BITS
from common.packed import Floats, Vectors, vectors_for
from common.segment import Region
from common.store.geometry import Geometry
from services.compute.blocks import Tokens
from services.compute.products import Bits, Products, Starts, Sums, Take


class CacheRows:
    """The rows of the cache's bytes, `region`."""

    def __init__(self, region: Region, geometry: Geometry, products: Products):
        self._items: Bits = np.frombuffer(region, BITS[geometry.number_format])
        self._products = products
        self.few = products.few_at_most(self._items)
        """Tokens whose products are `dot`'s; of more a block's are faster."""
        item, row = self._items.itemsize, geometry.row_bytes
        self._slot_items = geometry.stride_bytes // item
        self._place = {name: i * row // item for i, name in enumerate(geometry.parts)}

    def vectors(self, xs: torch.Tensor) -> Vectors:
        """A few tokens, `xs` float32 [tokens, hidden], as `dot` takes them."""
        return vectors_for(self._items, xs.numpy())

    def dot(self, part: str, slots: Starts, vectors: Vectors) -> Floats:
        """The products of one part of the bundles in `slots` int64 [count] with a few tokens:
        float32 [tokens or more, count]."""
        return self._products.dot_few(self._items, self._starts(part, slots), vectors)

    def add(self, part: str, slots: Starts, weights: Floats, out: Floats) -> None:
        """Adds those rows for each of a few tokens, each times its weight, float32 [tokens, count],
        to `out` float32 [tokens, hidden]."""
        self._products.add(self._items, self._starts(part, slots), weights, out)

    def dot_block(self, part: str, slots: Starts, tokens: Tokens, take: Take) -> None:
        """Those products for each token of a block; some at a time they are given to `take`."""
        self._products.dot_block(self._items, self._starts(part, slots), tokens, take)

    def add_block(self, part: str, slots: Starts, weights: torch.Tensor, sums: Sums) -> None:
        """Adds for each token those rows, each times its weight, float32 [count, tokens]."""
        self._products.add_block(self._items, self._starts(part, slots), weights, sums)

    def tokens(self, rows: torch.Tensor) -> Tokens:
        """A block's tokens [tokens, hidden] as `dot_block` takes them."""
        return self._products.tokens(rows)

    def sums(self, tokens: int, width: int) -> Sums:
        """Zeros, for `add_block`."""
        return self._products.sums(tokens, width)

    def _starts(self, part: str, slots: Starts) -> Starts:
        starts: Starts = starts_of(slots, self._slot_items, self._place[part])
        return starts
