"""Sums of int8 rows for a block of tokens: by the matrix unit, where this processor has one.

Where it has none the same has to be true of the sums by lists. Products: test_blocks.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import amx
from common.halves import LARGEST
from common.packed import Floats, packed, unpacked
from services.compute.products import Bits, Products, Starts

WIDTH = 64 * 17
INT8 = [np.dtype(np.int8)]


def matrix(rows: int, width: int = WIDTH) -> tuple[Bits, Starts, Floats]:
    """Random rows as they lie in memory, in no order, and what they stand for."""
    random = np.random.default_rng(rows)
    raw = packed(random.standard_normal((rows, width)).astype(np.float32), "int8")
    order = random.permutation(rows)
    starts = order.astype(np.int64) * raw.shape[1]
    return raw.reshape(-1).view(np.int8), starts, unpacked(raw, "int8", width)[order]


def add(products: Products, items: Bits, starts: Starts, weights: torch.Tensor) -> torch.Tensor:
    """Of rows of WIDTH, added once: float32 [tokens, width]."""
    with torch.inference_mode():
        sums = products.sums(items, weights.shape[1], WIDTH)
        assert sums.tiled == amx.usable()
        products.add_block(items, starts, weights, sums)
        return sums.total().clone()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 64, 131])
@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_no_more_is_lost_than_is_rounded(threads: int, rows: int, tokens: int) -> None:
    items, starts, wide = matrix(rows)
    torch.manual_seed(tokens)
    weights = torch.randn(rows, tokens) * (torch.rand(rows, tokens) < 0.4)
    weights *= torch.logspace(-3, 3, tokens)
    found = add(Products(threads, INT8), items, starts, weights)
    exact = torch.from_numpy(wide).double()
    expected = weights.T.double() @ exact
    # A weight, times its row's largest number, is rounded by half a step of the token's largest.
    of_rows = exact.abs().amax(dim=1)
    step = (weights.abs() * of_rows[:, None]).amax(dim=0) / LARGEST
    bound = step[:, None] / 2 * (exact.abs() / of_rows[:, None]).sum(dim=0)
    assert ((found - expected).abs() <= bound + expected.abs() * 1e-5 + 1e-30).all()


def test_it_is_added_to_what_is_there() -> None:
    items, starts, _ = matrix(70)
    products, weights = Products(2, INT8), torch.randn(70, 20)
    with torch.inference_mode():
        once = add(products, items, starts, weights)
        sums = products.sums(items, 20, WIDTH)
        for _ in range(2):
            products.add_block(items, starts, weights, sums)
        torch.testing.assert_close(sums.total(), 2 * once, rtol=1e-6, atol=0)


def test_what_is_no_number_comes_through_and_to_its_token_alone() -> None:
    items, starts, _ = matrix(70)
    weights = torch.randn(70, 20)
    good = add(Products(1, INT8), items, starts, weights)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = weights.clone()
        spoiled[69, 7] = bad
        found = add(Products(1, INT8), items, starts, spoiled)
        assert not found[7].isfinite().any()
        others = [t for t in range(20) if t != 7]
        assert torch.equal(found[others], good[others])


def test_rows_that_no_token_fires_add_nothing() -> None:
    items, starts, _ = matrix(70)
    assert not add(Products(2, INT8), items, starts, torch.zeros(70, 20)).any()


def test_a_width_that_is_no_whole_pair_of_tiles_is_added_by_lists() -> None:
    items, starts, wide = matrix(40, 72)
    weights = torch.randn(40, 30) * (torch.rand(40, 30) < 0.1)
    with torch.inference_mode():
        sums = Products(2, INT8).sums(items, 30, 72)
        assert not sums.tiled
        Products(2, INT8).add_block(items, starts, weights, sums)
    expected = weights.T @ torch.from_numpy(wide)
    torch.testing.assert_close(sums.total(), expected, rtol=1e-4, atol=1e-4)
