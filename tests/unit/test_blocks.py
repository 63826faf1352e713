"""Blocks of tokens multiplied in integers: what is lost, what comes through, and who chooses it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from common import amx
from common.kernels import BITS, row_starts
from common.packed import packed, unpacked
from common.rounded import LARGEST
from services.compute.blocks import BlockProbe, probe_blocks
from services.compute.linear import RowLinear, Rows
from services.compute.products import (
    CHUNK_ROWS,
    FEW_HALVED,
    FEW_ROUNDED,
    Bits,
    Products,
    Starts,
)

FORMATS = ("float16", "int8", "int4")
HALVED = [np.dtype(BITS[name]) for name in FORMATS]
WIDTH = 64 * 17  # whole steps of tiles
ODD = 32 * 33  # none, nor whole chunks of numbers of 16 bits


def matrix(number_format: str, rows: int, width: int = WIDTH) -> tuple[Bits, Starts, torch.Tensor]:
    """Random rows as they lie in memory, the last first, and what they stand for, float64."""
    values = torch.randn(rows, width).numpy()
    if number_format == "float16":
        halved = values.astype(np.float16)
        items, wide = halved.view(np.uint16).reshape(-1), halved.astype(np.float32)
    else:
        raw = packed(values, number_format)
        items = raw.reshape(-1).view(BITS[number_format])
        wide = unpacked(raw, number_format, width)
    starts = row_starts(rows, len(items) // rows)[::-1].copy()
    return items, starts, torch.from_numpy(wide).double().flip(0)


def multiply(products: Products, items: Bits, starts: Starts, x: torch.Tensor) -> torch.Tensor:
    """float32 [rows, tokens]"""
    found = torch.full((len(starts), len(x)), torch.nan)
    with torch.inference_mode():
        products.dot_block(
            items, starts, products.tokens(x), lambda i, j, made: found[i:j].copy_(made)
        )
    return found


@pytest.mark.parametrize("width", [WIDTH, ODD])
@pytest.mark.parametrize("number_format", FORMATS)
def test_rows_come_to_the_same_wherever_they_lie(number_format: str, width: int) -> None:
    """The rows of a part of the cache, or of a matrix."""
    items, starts, _ = matrix(number_format, 9, width)
    products, x = Products(1, HALVED), torch.randn(19, width)
    backwards = multiply(products, items, starts, x)
    for order in (range(8, -1, -1), [0, 2, 1, 3], [3, 1, 2, 0], [6, 5], [4]):
        found = multiply(products, items, starts[list(order)], x)
        assert torch.equal(found, backwards[list(order)])


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 19, 130])
@pytest.mark.parametrize("width", [WIDTH, ODD])
def test_no_more_is_lost_than_is_rounded(
    number_format: str, threads: int, tokens: int, width: int
) -> None:
    torch.manual_seed(tokens)
    items, starts, wide = matrix(number_format, 2 * CHUNK_ROWS + 5, width)
    x = torch.randn(tokens, width) * torch.logspace(-3, 3, tokens)[:, None]
    found = multiply(Products(threads, HALVED), items, starts, x)
    expected = wide @ x.double().T
    of_x = x.abs().amax(dim=1) / LARGEST / 2  # a number's error, of each token
    of_rows = wide.abs().amax(dim=1) / LARGEST / 2
    # Each number's error times the other's size; and times the other's error.
    bound = wide.abs().sum(dim=1)[:, None] * of_x + of_rows[:, None] * x.abs().sum(dim=1).double()
    bound += width * of_x * of_rows[:, None] + expected.abs() * 1e-6
    assert ((found - expected).abs() <= bound).all()
    loss = (found - expected).norm(dim=0) / expected.norm(dim=0)
    assert loss.max() < 2e-4


@pytest.mark.parametrize("width", [WIDTH, ODD])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_token_comes_to_the_same_bits_whatever_is_beside_it(
    number_format: str, width: int
) -> None:
    torch.manual_seed(3)
    items, starts, _ = matrix(number_format, 70, width)
    x = torch.randn(50, width)
    together = multiply(Products(2, HALVED), items, starts, x)
    for first, end in itertools.pairwise((0, 1, 18, 50)):
        alone = multiply(Products(1, HALVED), items, starts[:33], x[first:end])
        assert torch.equal(alone, together[:33, first:end])


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("width", [WIDTH, ODD])
def test_what_is_no_number_comes_through(number_format: str, bad: float, width: int) -> None:
    items, starts, wide = matrix(number_format, 5, width)
    x = torch.ones(3, width)
    x[1, 17] = bad
    found = multiply(Products(1, HALVED), items, starts, x)
    assert not found[:, 1].isfinite().any()
    expected = (wide.sum(dim=1)[:, None]).expand(-1, 2).float()
    torch.testing.assert_close(found[:, [0, 2]], expected, rtol=1e-3, atol=1e-2)


def test_blocks_that_are_multiplied_by_turns_keep_apart() -> None:
    """Though they are laid out in the same memory."""
    items, starts, _ = matrix("int8", 40)
    products, blocks = Products(2, HALVED), [torch.randn(n, WIDTH) for n in (30, 50)]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def take(first: int, end: int, made: torch.Tensor) -> None:
        out[first:end] = made

    with torch.inference_mode():
        laid_out = [products.tokens(block) for block in blocks]
        for which in (0, 1, 0, 1):
            out = torch.full((40, len(blocks[which])), torch.nan)
            products.dot_block(items, starts, laid_out[which], take)
            found[which].append(out)
    for which, block in enumerate(blocks):
        for one in found[which]:
            assert torch.equal(one, multiply(products, items, starts, block))


def test_nothing_and_next_to_nothing() -> None:
    items, starts, _ = matrix("float16", 5)
    for size in (0.0, 1e-44, 1e-38):
        found = multiply(Products(1, HALVED), items, starts, torch.full((2, WIDTH), size))
        assert (found.abs() <= size * WIDTH * 5).all()
    nothing = np.zeros(WIDTH, np.uint16)
    assert not multiply(Products(1, HALVED), nothing, starts[-1:], torch.ones(2, WIDTH)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_fit(sign: int) -> None:
    """Every product at its largest, of one sign, at the width of the largest models."""
    width = 32_768
    items = np.full(width, 1.0, np.float16).view(np.uint16)
    found = multiply(Products(1, HALVED), items, np.zeros(1, np.int64), torch.ones(2, width) * sign)
    torch.testing.assert_close(found, torch.full((1, 2), float(width * sign)))


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_module_gives_few_tokens_what_it_gives_a_block(number_format: str) -> None:
    torch.manual_seed(4)
    items, starts, wide = matrix(number_format, 90)
    products = Products(2, HALVED)
    linear = RowLinear(Rows(items, starts), torch.randn(90), products)
    few = (FEW_HALVED if amx.usable() else FEW_ROUNDED)[items.dtype]
    assert products.few_at_most(items) == few
    x = torch.randn(1, few + 1, WIDTH)
    with torch.inference_mode():
        assert linear.bias is not None
        block, rows = linear(x), linear(x[:, :few])
        expected = x.double() @ wide.T + linear.bias.double()
    torch.testing.assert_close(block, expected.float(), rtol=1e-3, atol=0.05)
    torch.testing.assert_close(rows, block[:, :few], rtol=1e-3, atol=0.05)


def test_integers_are_taken_where_they_are_faster() -> None:
    slow = BlockProbe(float32_us=1, float16_us=2, int8_us=2, int4_us=2)
    some = dataclasses.replace(slow, float32_us=3, float16_us=4, int4_us=4)
    fast = dataclasses.replace(slow, float32_us=3)
    assert [probe.names for probe in (slow, some)] == [[], ["int8"]]
    assert fast.names == list(FORMATS)
    assert fast.halved == HALVED


def test_the_probe_measures() -> None:
    probe = probe_blocks()
    assert min(probe.float32_us, probe.float16_us, probe.int8_us, probe.int4_us) > 0
