"""`exact` names every neuron that fires, and few others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.limits import PREDICT_TOGETHER_MAX
from common.lowrank import Int8Rows, Int8Tall
from common.messages import Predict
from services.predictor.loop import input_of
from services.predictor.predictors import PREDICTORS


@pytest.mark.parametrize("variant", ["opt", "llama-relu", "llama-fatrelu", "llama-mlp-bias"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_names_all_that_fire_and_little_more(store_of: Any, variant: str, dtype: str) -> None:
    store = store_of(variant, dtype)
    exact = PREDICTORS["exact"](store)
    random = np.random.default_rng(0)
    part = store.geometry.parts[0]
    for layer in range(store.geometry.layers):
        x = random.normal(size=(3, store.geometry.hidden)).astype(np.float32)
        z = x.astype(np.float64) @ store.rows(layer, part).astype(np.float64).T
        z += store.biases(layer).get(part, 0.0)
        fire = set(np.flatnonzero((z > store.activation.threshold).any(axis=0)))
        named = exact.name(layer, x)
        assert np.all(np.diff(named) > 0)
        assert fire <= set(named.tolist())
        assert len(named) <= len(fire) + 0.02 * store.geometry.neurons + 1


def test_all_names_the_layer(store_of: Any) -> None:
    store = store_of("opt", "float32")
    everything = PREDICTORS["all"](store)
    x = np.zeros((1, store.geometry.hidden), dtype=np.float32)
    assert everything.name(0, x).tolist() == list(range(store.geometry.neurons))


def test_input_that_does_not_fit_is_refused(store_of: Any) -> None:
    geometry = store_of("opt", "float32").geometry
    row = b"\0" * geometry.hidden * 4
    for layer in (-1, 0, geometry.layers - 1):
        good = input_of(Predict((1,), (1,), 1, layer, False, True, row * 2), geometry)
        assert good is not None
        assert good.shape == (2, geometry.hidden)
    for layer, x in [
        (geometry.layers, row),
        (-2, row),
        (0, row[:-1]),
        (0, b""),
        (0, row * (PREDICT_TOGETHER_MAX + 1)),
    ]:
        assert input_of(Predict((1,), (0,), 1, layer, False, True, x), geometry) is None
    for requests, newest in [((), ()), ((1, 2), (0,)), ((1,), (3,)), ((1, 2), (0, -1))]:
        assert input_of(Predict(requests, newest, 1, 0, False, True, row * 3), geometry) is None
    for newest in [(0, 1, 2), (0, 2, 1)]:
        good = input_of(Predict((1, 2, 3), newest, 1, 0, False, True, row * 3), geometry)
        assert good is not None


def test_names_of_predictors_are_those_of_the_setting(tmp_path: Path) -> None:
    from common.config import read_settings

    for name in PREDICTORS:
        read_settings({"INFLASH_STORE": str(tmp_path), "INFLASH_PREDICTOR": name})


@pytest.mark.parametrize("laid_out", [Int8Rows, Int8Tall])
def test_int8_rows_multiply_as_what_they_stand_for(laid_out: type[Int8Rows | Int8Tall]) -> None:
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((50, 3000)).astype(np.float32)
    matrix[7] = 0
    rows = laid_out.of(matrix)
    if laid_out is Int8Rows:
        values, off = rows.values, 1e-3
    else:  # in blocks of columns, by pairs; and x is rounded
        values, off = rows.values.swapaxes(1, 2).reshape(-1, 3000)[:50], 1e-2
    near = values * rows.scales[:, None]
    assert (np.abs(near - matrix).max(axis=1) <= np.abs(matrix).max(axis=1) / 253).all()
    for count in (1, 3, PREDICT_TOGETHER_MAX + 1):
        x = rng.standard_normal((count, 3000)).astype(np.float32)
        np.testing.assert_allclose(rows.dot(x), x @ near.T, rtol=1e-3, atol=off)
