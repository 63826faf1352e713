"""What a predictor is, and the ones there are: FFN input in, ids of the neurons to read out.

    all      every neuron: the dense baseline
    exact    the neurons that fire, from weights held in memory: for small models and for proofs
    lowrank  those that fitted factors name, for this layer and, a layer ahead, for the next one

A predictor that names too many costs reads; one that names too few costs accuracy. `all` and
`exact` lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np

from common.lowrank import Floats, Ids, ahead_features, read_predictors
from common.store.store import Store


class Predictor(Protocol):
    def name(self, layer: int, x: Floats) -> Ids:
        """Ascending ids of the neurons that may fire for any row of `x` [rows, hidden]."""

    def look_ahead(self, layer: int, x: Floats) -> Ids | None:
        """Ids of the neurons of the layer after `layer` that will probably fire, the surest first.

        `x` [hidden] is the input of `layer` (-1: the embedding) for the newest token. None: there
        is no layer after it, or nothing can be said.
        """

    def remember(self, layer: int, x: Floats) -> None:
        """`x` [hidden] was the input of `layer`: the next token's look-ahead starts from it."""

    def forget(self) -> None:
        """The next token follows on none that was seen: another request begins."""


class Everything:
    """Names every neuron of the layer."""

    def __init__(self, store: Store):
        self._ids = np.arange(store.geometry.neurons, dtype=np.int32)

    def name(self, layer: int, x: Floats) -> Ids:
        return self._ids

    def look_ahead(self, layer: int, x: Floats) -> Ids | None:
        return None

    def remember(self, layer: int, x: Floats) -> None: ...

    def forget(self) -> None: ...


class Exact:
    """Names the neurons whose pre-activation passes the threshold, and those within its own error.

    Holds the first part of every bundle (up rows, or gate rows of a gated FFN) as float32. A
    neuron so close to the threshold that this float32 sum may err, or that the threshold's own
    rounding to the store's dtype decides, is named too: one too many costs a read.
    """

    # Of a dot product in float32, relative to |row|·|x|; well above what was seen (3e-7).
    SUM_ERROR = 2e-6
    # Of the result, relative to the threshold, when compute stores it in the store's dtype.
    ROUND_ERROR: ClassVar = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}

    def __init__(self, store: Store):
        geometry = store.geometry
        part = geometry.parts[0]
        layers = range(geometry.layers)
        self._rows = [store.rows(layer, part) for layer in layers]
        # Not linalg.norm: it squares a copy of the layer.
        self._norms = [np.sqrt(np.einsum("ij,ij->i", rows, rows)) for rows in self._rows]
        none = np.zeros(geometry.neurons, dtype=np.float32)
        self._biases = [store.biases(layer).get(part, none) for layer in layers]
        threshold = store.activation.threshold
        self._threshold = threshold - abs(threshold) * self.ROUND_ERROR[geometry.dtype]

    def name(self, layer: int, x: Floats) -> Ids:
        z = x @ self._rows[layer].T + self._biases[layer]
        slack = self.SUM_ERROR * np.outer(np.linalg.norm(x, axis=1), self._norms[layer])
        # Not "above": a damaged bundle's row is NaN. It is named, so that its read tells.
        fires = ~(z + slack <= self._threshold).all(axis=0)
        return np.flatnonzero(fires).astype(np.int32)

    def look_ahead(self, layer: int, x: Floats) -> Ids | None:
        return None

    def remember(self, layer: int, x: Floats) -> None: ...

    def forget(self) -> None: ...


class LowRank:
    """Names what the fitted factors in the store name: see common/lowrank.py."""

    def __init__(self, store: Store):
        factors = read_predictors(store)
        self._same, self._ahead = factors["same"], factors["ahead"]
        self._latest: dict[int, Floats] = {}  # by layer: the newest token's input, [1, hidden]
        # Compiles what it takes, for an input as messages bring it, so that no token waits for it.
        self.name(0, np.frombuffer(bytes(4 * store.geometry.hidden), np.float32)[None])

    def name(self, layer: int, x: Floats) -> Ids:
        return self._same[layer].name(x)

    def look_ahead(self, layer: int, x: Floats) -> Ids | None:
        before, own = self._latest.get(layer), self._latest.get(layer + 1)
        if before is None or own is None:  # the first token of a request, or the last layer
            return None
        return self._ahead[layer + 1].rank(ahead_features(x[None], before, own))

    def remember(self, layer: int, x: Floats) -> None:
        self._latest[layer] = x[None]

    def forget(self) -> None:
        self._latest.clear()


PREDICTORS: dict[str, Callable[[Store], Predictor]] = {
    "all": Everything,
    "exact": Exact,
    "lowrank": LowRank,
}
