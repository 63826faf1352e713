"""What a predictor is, and the ones there are: FFN input in, ids of the neurons to read out.

    all      every neuron: the dense baseline
    exact    the neurons that fire, from weights held in memory: for small models and for proofs
    lowrank  those that fitted factors name, for this layer and, a layer ahead, for the next one

A predictor that names too many costs reads; one that names too few costs accuracy. `all` and
`exact` lose nothing.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np

from common.limits import PREDICT_REQUESTS_KEPT
from common.lowrank import AHEAD_PARTS, Floats, Ids, ahead_features, read_predictors
from common.store.store import Store


class Predictor(Protocol):
    def name(self, layer: int, x: Floats) -> Ids:
        """Ascending ids of the neurons that may fire for any row of `x` [rows, hidden]."""

    def look_ahead(self, requests: Sequence[int], layer: int, x: Floats) -> Ids | None:
        """Ids of the neurons of the layer after `layer` that will probably fire, the surest first.

        `x` [requests, hidden] is the input of `layer` (-1: the embedding) for each request's
        newest token. None: there is no layer after it, or nothing can be said.
        """

    def remember(self, request: int, layer: int, x: Floats) -> None:
        """`x` [hidden] was the input of `layer`: the look-ahead of the request's next token starts
        from it."""


class Everything:
    """Names every neuron of the layer."""

    def __init__(self, store: Store):
        self._ids = np.arange(store.geometry.neurons, dtype=np.int32)

    def name(self, layer: int, x: Floats) -> Ids:
        return self._ids

    def look_ahead(self, requests: Sequence[int], layer: int, x: Floats) -> Ids | None:
        return None

    def remember(self, request: int, layer: int, x: Floats) -> None: ...


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

    def look_ahead(self, requests: Sequence[int], layer: int, x: Floats) -> Ids | None:
        return None

    def remember(self, request: int, layer: int, x: Floats) -> None: ...


class LowRank:
    """Names what the fitted factors in the store name: see common/lowrank.py."""

    def __init__(self, store: Store):
        factors = read_predictors(store)
        self._same, self._ahead = factors["same"], factors["ahead"]
        # By request, the longest unheard-of first, and layer: the newest token's input [hidden].
        self._latest: OrderedDict[int, dict[int, Floats]] = OrderedDict()
        # Compiles what it takes, for an input as messages bring it, so that no token waits for it.
        hidden = store.geometry.hidden
        self.name(0, np.frombuffer(bytes(4 * hidden), np.float32)[None])
        self._ahead[0].rank(np.zeros((1, AHEAD_PARTS * hidden), np.float32))

    def name(self, layer: int, x: Floats) -> Ids:
        return self._same[layer].name(x)

    def look_ahead(self, requests: Sequence[int], layer: int, x: Floats) -> Ids | None:
        known = defaultdict(list)
        for request, now in zip(requests, x, strict=True):
            latest = self._latest.get(request, {})
            before, own = latest.get(layer), latest.get(layer + 1)
            if before is not None and own is not None:
                for name, values in (("now", now), ("before", before), ("own", own)):
                    known[name].append(values)
        if not known:  # the first token of a request, or the last layer
            return None
        features = ahead_features(*(np.stack(known[name]) for name in ("now", "before", "own")))
        return self._ahead[layer + 1].rank(features)

    def remember(self, request: int, layer: int, x: Floats) -> None:
        self._latest.setdefault(request, {})[layer] = x
        self._latest.move_to_end(request)
        if len(self._latest) > PREDICT_REQUESTS_KEPT:
            self._latest.popitem(last=False)


PREDICTORS: dict[str, Callable[[Store], Predictor]] = {
    "all": Everything,
    "exact": Exact,
    "lowrank": LowRank,
}
