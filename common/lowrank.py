"""Low-rank predictors: the file that `inflash fit` writes, and the scores that it stands for.

    STORE/predictors.safetensors      STORE/predictors.json: its report and digest

    layers.L.same.a    [r, hidden]         of the layer's own FFN input
    layers.L.ahead.a   [r, 3 × hidden]     of what is known one layer before: `ahead_features`
    layers.L.*.b       [neurons, r]
    layers.L.*.bias    [neurons]           the threshold is in it

A neuron is named if its score, (f @ a.T) @ b.T + bias, is above 0 (the paper's d → r → n, section
3.2). `a` and `b` are float16 in the file and int8 in memory, with a scale for each row: a quarter
of float32's bytes, which the cache has instead. No torch here: the predictor process imports this,
and torch takes 130 MB.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import StoreError
from common.limits import PREDICT_TOGETHER_MAX
from common.store.geometry import Geometry
from common.store.store import Store, forget_pages
from common.store.tensors import Tensor, read_float32, read_header

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Kind = Literal["same", "ahead"]

PREDICTORS = "predictors.safetensors"
REPORT = "predictors.json"  # written after it: names its digest
PICTURE = "predictors.png"
FILES = (PREDICTORS, REPORT, PICTURE)
EMBEDDING = -1  # as a layer: what enters layer 0, from which layer 0 is looked ahead
AHEAD_PARTS = 3
CACHE_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)  # of a layer, that the report's misses are for


def ahead_features(
    now: npt.NDArray[Any], before: npt.NDArray[Any], own_before: npt.NDArray[Any]
) -> Floats:
    """What look-ahead for a layer starts from, of some tokens: float32 [tokens, 3 × hidden].

    The token before tells much of what attention will add: without it, look-ahead has to name 1.4
    times as many neurons for the same recall (docs/measurements.md).

    Args:
        now: [tokens, hidden], FFN input of the layer before (of layer 0: the embedding).
        before: the same, of the token before each of them.
        own_before: FFN input of the layer itself, of the token before each of them.
    """
    return np.concatenate([now, before, own_before], axis=1, dtype=np.float32)


# Gateway and reader know predictors by their files alone: numba, which the products' kernels come
# with, takes a process a third of its start and 60 MB. So they are imported where they are used.


@dataclass(frozen=True)
class Int8Rows:
    """A matrix [rows, width] as int8 and a scale per row: row i is scales[i] × values[i]."""

    values: npt.NDArray[np.int8]
    scales: Floats

    @classmethod
    def of(cls, matrix: npt.NDArray[Any]) -> Int8Rows:
        """The nearest to `matrix`: off by at most a 254th of a row's largest value."""
        return cls(*_as_int8(matrix))

    def dot(self, x: Floats) -> Floats:
        """`x` [n, width] times every row: [n, rows]."""
        if len(x) > PREDICT_TOGETHER_MAX:  # an evaluation's: not while a token waits
            return (x @ self.values.astype(np.float32).T) * self.scales
        from common.float_rows import dot_many_at
        from common.kernels import row_starts

        starts = row_starts(*self.values.shape)
        out = np.empty((len(x), len(starts)), np.float32)
        dot_many_at(self.values.reshape(-1), starts, np.ascontiguousarray(x), 0, len(starts), out)
        out *= self.scales
        return out


@dataclass(frozen=True)
class Int8Tall:
    """The same of a matrix of many short rows, which lies by columns (common/tall.py): row by row
    its products took twice as long (docs/measurements.md)."""

    values: npt.NDArray[np.int8]
    scales: Floats

    @classmethod
    def of(cls, matrix: npt.NDArray[Any]) -> Int8Tall:
        from common.tall import blocks_of

        values, scales = _as_int8(matrix)
        return cls(blocks_of(values), scales)

    def dot(self, x: Floats) -> Floats:
        """`x` [n, width] times every row: [n, rows]."""
        return self.sums(x) * self.scales

    def sums(self, x: Floats) -> Floats:
        """The same without the scales."""
        from common.tall import sums_of

        return sums_of(self.values, len(self.scales), x)


def _as_int8(matrix: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], Floats]:
    largest = np.abs(matrix).max(axis=1, initial=0).astype(np.float32)
    scales = np.maximum(largest / 127, np.finfo(np.float32).tiny)
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales


@dataclass(frozen=True)
class Factors:
    """One predictor of one layer: a [r, features], b [neurons, r], bias float32 [neurons]."""

    a: Int8Rows
    b: Int8Tall
    bias: Floats

    @classmethod
    def of(cls, a: npt.NDArray[Any], b: npt.NDArray[Any], bias: Floats) -> Factors:
        """The nearest to factors of any floating dtype."""
        return cls(Int8Rows.of(a), Int8Tall.of(b), bias)

    def scores(self, features: Floats) -> Floats:
        """[rows, neurons], of features float32 [rows, features]."""
        scores = self.b.dot(self.a.dot(features))
        scores += self.bias
        return scores

    def name(self, features: Floats) -> Ids:
        """Ascending ids of the neurons named for any of the rows [rows, features]."""
        from common.firing import name

        named: Ids = name(self.b.sums(self.a.dot(features)), self.b.scales, self.bias)
        return named

    def rank(self, features: Floats) -> Ids:
        """Ids of the neurons named for any of the rows [rows, features], the surest first."""
        scores = self.scores(features).max(axis=0)
        named = np.flatnonzero(scores > 0).astype(np.int32)
        return named[np.argsort(-scores[named], kind="stable")]


def tensor_name(layer: int, kind: Kind, field: str) -> str:
    return f"layers.{layer}.{kind}.{field}"


def has_predictors(store: Store) -> bool:
    return (store.path / PREDICTORS).is_file()


def read_predictors(store: Store) -> dict[Kind, list[Factors]]:
    """Both predictors of every layer; `StoreError` if there are none, or not of this store."""
    path = store.path / PREDICTORS
    if not path.is_file():
        raise StoreError(
            f"the store {store.path} has no fitted predictors ({PREDICTORS}): run"
            f" `inflash fit {store.path}`, or choose --predictor exact"
        )
    tensors = read_header(path)
    if problem := predictor_problem(store):
        raise StoreError(f"{problem}: run `inflash fit {store.path}` again")
    kinds: tuple[Kind, ...] = ("same", "ahead")
    return {
        kind: [_read(path, tensors, layer, kind, store.geometry) for layer in _layers(store)]
        for kind in kinds
    }


def predictor_problem(store: Store) -> str:
    """What is wrong with the store's predictors, by their report and digest; "" if nothing is."""
    path, report = store.path / PREDICTORS, store.path / REPORT
    try:
        content = json.loads(report.read_bytes())
        fitted_for, digest = content["store"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{report} is missing or damaged"
    if fitted_for != store.id:
        return f"{path} was fitted for another store"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return f"{path} is damaged: it is not what its digest says"
        forget_pages(file.fileno())
    return ""


def named_shares(store: Store) -> list[float] | None:
    """Share of each layer's neurons that its predictor names for a token; None without a fit."""
    try:
        report = json.loads((store.path / REPORT).read_bytes())
        shares = [row["active"] * row["same"]["named_per_active"] for row in report["layers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = report.get("store") == store.id and len(shares) == store.geometry.layers
    return shares if ours else None


def predictor_bytes(store: Store) -> int:
    """Bytes that the predictors take in memory: matrices as int8 with their scales, biases."""
    shapes = [tensor.shape for tensor in read_header(store.path / PREDICTORS).values()]
    return sum(int(np.prod(s)) + 4 * s[0] if len(s) == 2 else 4 * s[0] for s in shapes)


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a safetensors file carries; its tensors were checked by `read_header`."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def _layers(store: Store) -> range:
    return range(store.geometry.layers)


def _read(
    path: Path, tensors: dict[str, Tensor], layer: int, kind: Kind, geometry: Geometry
) -> Factors:
    found = []
    for field in ("a", "b", "bias"):
        name = tensor_name(layer, kind, field)
        if name not in tensors:
            raise StoreError(f"{path} lacks {name}: run `inflash fit` again")
        found.append(tensors[name])
    a, b, bias = found
    features = geometry.hidden * (AHEAD_PARTS if kind == "ahead" else 1)
    rank = a.shape[0] if a.shape else 0
    shapes = [(rank, features), (geometry.neurons, rank), (geometry.neurons,)]
    if [tensor.shape for tensor in found] != shapes:
        raise StoreError(f"{path}: the shapes of layer {layer} {kind} do not fit the store")
    return Factors.of(read_float32(a), read_float32(b), read_float32(bias))
