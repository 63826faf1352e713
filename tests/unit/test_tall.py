"""Matrices of many short rows, multiplied by columns."""

from __future__ import annotations

import numpy as np
import pytest

from common.tall import COLUMNS, blocks_of, sums_of


@pytest.mark.parametrize("rows", [1, COLUMNS, 3 * COLUMNS + 5])
@pytest.mark.parametrize("width", [1, 7, 64, 1101])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 9])
def test_products(rows: int, width: int, vectors: int) -> None:
    random = np.random.default_rng(rows + width)
    matrix = random.integers(-127, 128, (rows, width)).astype(np.int8)
    xs = random.standard_normal((vectors, width)).astype(np.float32)
    found = sums_of(blocks_of(matrix), rows, xs)
    assert found.shape == (vectors, rows)
    assert found.flags.c_contiguous
    expected = xs.astype(np.float64) @ matrix.T
    sizes = np.abs(matrix.T.astype(np.float64))
    rounded = np.abs(xs).max(axis=1, keepdims=True) / 32767 / 2  # what a number is off at most
    of_sums = (np.abs(xs).astype(np.float64) @ sizes) * (3 + width / 512) * 2.0**-23
    assert (np.abs(found - expected) <= rounded * sizes.sum(axis=0) + of_sums + 1e-12).all()
    for v in range(vectors):
        assert np.array_equal(sums_of(blocks_of(matrix), rows, xs[v : v + 1])[0], found[v])


def test_what_is_no_number_comes_through() -> None:
    matrix, xs = np.ones((40, 8), np.int8), np.ones((3, 8), np.float32)
    xs[1, 3] = np.nan
    found = sums_of(blocks_of(matrix), 40, xs)
    assert np.isnan(found[1]).all()
    assert (found[[0, 2]] == 8).all()
