"""The rows that lie in the cache, by slot: what a layer multiplies, where the reader put it.

A row is one part of one bundle, [hidden]. All products are float32, whatever the rows are; packed
ones are multiplied as they are packed.
"""

from __future__ import annotations

import numpy as np
import torch

from common.kernels import BITS
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
        """Tokens whose products are `dot_many`'s; of more a block's are faster."""
        item, row = self._items.itemsize, geometry.row_bytes
        self._slot_items = geometry.stride_bytes // item
        self._place = {name: i * row // item for i, name in enumerate(geometry.parts)}

    def dot(self, part: str, slots: Starts, x: torch.Tensor) -> torch.Tensor:
        """The products of one part of the bundles in `slots` int64 [count] with `x` float32
        [hidden]: float32 [count]."""
        return self._products.dot(self._items, self._starts(part, slots), x)

    def add(self, part: str, slots: Starts, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Adds those rows, each times its weight, float32 [count], to `out` float32 [hidden]."""
        self._products.add(self._items, self._starts(part, slots), weights, out)

    def dot_many(self, part: str, slots: Starts, xs: torch.Tensor) -> torch.Tensor:
        """The same for a few tokens, `xs` float32 [tokens, hidden]: float32 [tokens, count]."""
        return self._products.dot_each([(self._items, self._starts(part, slots))], xs)[0]

    def add_many(self, part: str, slots: Starts, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Adds for each of a few tokens those rows, each times its weight, float32 [tokens, count],
        to `out` float32 [tokens, hidden]."""
        self._products.add_many(self._items, self._starts(part, slots), weights, out)

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
        return slots * self._slot_items + self._place[part]
