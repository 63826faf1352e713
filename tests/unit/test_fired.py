"""Sums of the rows that tokens fire: every row and token, wherever a tile or a lane ends."""

from __future__ import annotations

import numpy as np
import pytest

from common.fired import LANES, TILE_ROWS, add_fired, list_fired
from common.kernels import BITS, row_starts
from common.packed import packed, unpacked
from common.store.geometry import GROUP

WIDTH, STEP = 4 * GROUP, 2 * GROUP


@pytest.mark.parametrize("number_format", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, TILE_ROWS, 2 * TILE_ROWS + 3])
@pytest.mark.parametrize("tokens", [1, LANES, 2 * LANES + 5])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_sums_are_those_of_a_product(
    number_format: str, rows: int, tokens: int, share: float
) -> None:
    random = np.random.default_rng(rows + tokens)
    values = random.standard_normal((rows, WIDTH)).astype(np.float32)
    if number_format in ("int8", "int4"):
        raw = packed(values, number_format)
        wide = unpacked(raw, number_format, WIDTH)
    else:
        raw = values.astype(number_format).view(np.uint8)
        wide = values.astype(number_format).astype(np.float32)
    items = raw.reshape(-1).view(BITS[number_format])
    order = random.permutation(rows)
    starts = row_starts(rows, len(items) // rows)[order]
    weights = random.standard_normal((rows, tokens)).astype(np.float32)
    weights *= random.random((rows, tokens)) < share
    count = int(np.count_nonzero(weights))
    fired = list_fired(items, starts, weights, STEP, count)
    assert fired is not None
    assert set(fired.starts[: fired.ends[-1]]) == set(starts[weights.any(axis=1)])
    if count:
        assert list_fired(items, starts, weights, STEP, count - 1) is None
    room = np.full((TILE_ROWS, STEP), np.nan, np.float32)
    for first in (0, STEP):
        out = np.ones((tokens, STEP), np.float32)
        add_fired(items, fired, WIDTH, first, room, out)
        expected = 1 + weights.T @ wide[order][:, first : first + STEP]
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)


def test_what_is_no_number_comes_through() -> None:
    rows = np.ones(2 * STEP, np.float32)
    weights = np.zeros((2, LANES + 1), np.float32)
    weights[0, 0], weights[1, LANES] = np.nan, -np.inf
    fired = list_fired(rows, row_starts(2, STEP), weights, STEP, 2)
    assert fired is not None
    out = np.zeros((LANES + 1, STEP), np.float32)
    add_fired(rows, fired, STEP, 0, np.empty((TILE_ROWS, STEP), np.float32), out)
    assert np.isnan(out[0]).all()
    assert (out[LANES] == -np.inf).all()
    assert not out[1:LANES].any()
