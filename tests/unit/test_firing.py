"""What follows products of a few tokens, against numpy's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from common.firing import fire, name, scale, starts_of, within

NONE = np.empty(0, np.float32)


@pytest.mark.parametrize("few", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("threshold", "squared"), [(0.0, False), (0.0, True), (0.7, False)])
def test_what_fires_for_any_token(few: int, biased: bool, threshold: float, squared: bool) -> None:
    random = np.random.default_rng(few)
    ids, slots = random.permutation(90)[:40], random.permutation(500)[:40]
    bias = random.standard_normal(90).astype(np.float32) if biased else NONE
    z = random.standard_normal((few + 1, 40)).astype(np.float32)  # a row more, as products may have
    before = z[:few] + (bias[ids] if biased else 0)
    expected = np.where(before > threshold, before**2 if squared else before, 0)
    fires = expected.any(axis=0)
    assert 0 < fires.sum() < 40
    their_ids, their_slots, h = fire(z, few, bias, ids, slots, threshold, squared)
    np.testing.assert_array_equal(their_ids, ids[fires])
    np.testing.assert_array_equal(their_slots, slots[fires])
    np.testing.assert_allclose(h, expected[:, fires], rtol=1e-6)
    up = random.standard_normal((few, len(their_ids))).astype(np.float32)
    expected = h * (up + (bias[their_ids] if biased else 0))
    scale(h, up, bias, their_ids)
    np.testing.assert_allclose(h, expected, rtol=1e-6)


def test_what_is_no_number_fires() -> None:
    z, ids = np.array([[np.nan, -1.0, np.inf, -np.inf]], np.float32), np.arange(4)
    found, _, h = fire(z, 1, NONE, ids, ids, 0.0, False)
    np.testing.assert_array_equal(found, [0, 2])
    np.testing.assert_array_equal(h, [[np.nan, np.inf]])


def test_what_is_above_in_any_row_is_named() -> None:
    random = np.random.default_rng(0)
    sums = random.standard_normal((3, 1000)).astype(np.float32)
    scales, bias = random.random((2, 1000)).astype(np.float32)
    named = name(sums, scales, bias - np.float32(1.5))
    expected = np.flatnonzero((sums * scales + bias - 1.5 > 0).any(axis=0))
    assert named.dtype == np.int32
    assert 0 < len(named) < 1000
    np.testing.assert_array_equal(named, expected)


@pytest.mark.parametrize(("values", "all_are"), [([], True), ([0, 9], True), ([3, 10], False),
                                                 ([-1, 3], False)])  # fmt: skip
def test_whether_all_are_within(values: list[int], all_are: bool) -> None:
    assert within(np.array(values, np.int32), 10) == all_are


def test_where_rows_begin() -> None:
    np.testing.assert_array_equal(starts_of(np.array([2, 0]), 8, 3), [19, 3])
