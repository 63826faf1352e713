"""The kernels against numpy's and torch's own arithmetic, in every number format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common.float_rows import add_at, dot_many_at
from common.kernels import BITS, row_starts, widen_at
from common.packed import packed
from services.compute.products import (
    CHUNK_ROWS,
    CHUNK_WIDTH,
    FIRED_MAX,
    SHARED_BYTES_MIN,
    Products,
    bits_of,
)

DTYPES = ["float16", "bfloat16", "float32"]


def dot_at(items: Any, starts: Any, x: Any, out: Any) -> None:
    """Of one vector."""
    dot_many_at(items, starts, x[None], 0, len(starts), out[None])


def matrix(dtype: str, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of a dtype, and the same numbers as float32."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    values = values.to(getattr(torch, dtype))
    return values, values.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 30])
def test_rows_anywhere(dtype: str, count: int) -> None:
    values, wide = matrix(dtype, 40, 50)
    chosen = torch.randperm(40)[:count]
    items, starts = bits_of(values), row_starts(40, 50)[chosen.numpy()]
    x, weights = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    out = np.empty(count, np.float32)
    dot_at(items, starts, x, out)
    np.testing.assert_allclose(out, wide[chosen].numpy() @ x, rtol=1e-5, atol=1e-5)
    sums = x.copy()
    add_at(items, starts, weights[:count], sums)
    expected = x + weights[:count] @ wide[chosen].numpy()
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    rows = np.empty((count, 50), np.float32)
    widen_at(items, starts, rows)
    np.testing.assert_array_equal(rows, wide[chosen].numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_comes_through(dtype: str) -> None:
    special = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 65504.0, torch.inf, -torch.inf, torch.nan])
    values = special.to(getattr(torch, dtype))
    out = np.empty((1, len(special)), np.float32)
    widen_at(bits_of(values), row_starts(1, len(special)), out)
    np.testing.assert_array_equal(out[0], values.float().numpy())
    found = np.empty(1, np.float32)
    dot_at(bits_of(values), row_starts(1, len(special)), np.ones(8, np.float32), found)
    assert np.isnan(found[0])


def test_int8_rows() -> None:
    values = np.random.default_rng(0).integers(-128, 128, (9, 33)).astype(BITS["int8"])
    x = np.ones(33, np.float32)
    out = np.empty(9, np.float32)
    dot_at(values.reshape(-1), row_starts(9, 33), x, out)
    np.testing.assert_array_equal(out, values.sum(axis=1))


@pytest.mark.parametrize("threads", [1, 2, 3, 9])  # of 9 fewer take part: there is too little
def test_threads_share_a_product(threads: int) -> None:
    rows, width = 2 * SHARED_BYTES_MIN // 2 // 1000, 1000
    values, wide = matrix("float16", rows, width)
    products, starts = Products(threads), row_starts(rows, width)
    x, weights, out = torch.randn(width), torch.randn(1, rows), torch.zeros(1, width)
    found = products.dot(bits_of(values), starts, x)
    assert torch.allclose(found, wide @ x, rtol=1e-4, atol=1e-3)
    products.add(bits_of(values), starts, weights.numpy(), out.numpy())
    assert torch.allclose(out, weights @ wide, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "int4"])
@pytest.mark.parametrize("few", [2, 4, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_vector_among_others_comes_to_the_same_bits(dtype: str, few: int, threads: int) -> None:
    """What a token gets does not depend on the tokens beside it."""
    rows, width = SHARED_BYTES_MIN // 512 + 7, 1024
    if dtype in DTYPES:
        items, starts = bits_of(matrix(dtype, rows, width)[0]), row_starts(rows, width)
    else:
        raw = packed(matrix("float32", rows, width)[1].numpy(), dtype)
        items = raw.reshape(-1).view(BITS[dtype])
        starts = row_starts(*raw.shape)
    products = Products(threads)
    xs, out = torch.randn(few, width), torch.randn(few, width)
    weights = torch.randn(few, rows) * (torch.rand(few, rows) < 0.3)
    alone = out.clone()
    dots = products.dot_each([(items, starts)], xs)[0]
    products.add(items, starts, weights.numpy(), out.numpy())
    for b in range(few):
        assert torch.equal(dots[b], products.dot(items, starts, xs[b]))
        fired = weights[b].nonzero().squeeze(1)
        its = weights[b : b + 1, fired].numpy()
        products.add(items, starts[fired.numpy()], its, alone[b : b + 1].numpy())
        assert torch.equal(out[b], alone[b])


@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "int4"])
@pytest.mark.parametrize("width", [64, 32 * 33])
def test_rows_come_to_the_same_bits_wherever_they_lie(dtype: str, width: int) -> None:
    """Those that lie one after another are taken otherwise than those that do not."""
    if dtype in DTYPES:
        items, starts = bits_of(matrix(dtype, 9, width)[0]), row_starts(9, width)
    else:
        raw = packed(matrix("float32", 9, width)[1].numpy(), dtype)
        items, starts = raw.reshape(-1).view(BITS[dtype]), row_starts(*raw.shape)
    products, x = Products(1), torch.randn(width)
    in_order = products.dot(items, starts, x)
    for order in ([0, 2, 1, 3], [8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 4, 4], [5]):
        assert torch.equal(products.dot(items, starts[order], x), in_order[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_a_block_of_tokens(dtype: str, threads: int) -> None:
    rows, width, tokens = 2 * CHUNK_ROWS + 5, CHUNK_WIDTH + 7, 19
    values, wide = matrix(dtype, rows, width)
    products, starts = Products(threads), row_starts(rows, width)[::-1].copy()
    with torch.inference_mode():  # as compute runs: its threads have to be in it, too
        x = torch.randn(width, tokens)
        found = torch.empty(rows, tokens)
        products.dot_block(
            bits_of(values),
            starts,
            products.tokens(x.T),
            lambda i, j, made: found[i:j].copy_(made),
        )
        torch.testing.assert_close(found, wide.flip(0) @ x, rtol=1e-4, atol=1e-3)
        all_fire = torch.randn(rows, tokens)
        few_fire = all_fire * (torch.rand(rows, tokens) < FIRED_MAX / 2)
        for weights in (all_fire, few_fire):
            sums = products.sums(tokens, width)
            products.add_block(bits_of(values), starts, weights, sums)
            products.add_block(bits_of(values), starts, weights, sums)
            assert len(sums.pieces) >= threads
            expected = 2 * weights.T @ wide.flip(0)
            torch.testing.assert_close(sums.total(), expected, rtol=1e-4, atol=1e-3)


def test_what_fails_in_a_thread_fails_the_product() -> None:
    def fail(first: int, end: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Products(2).share(8, 1, fail)
