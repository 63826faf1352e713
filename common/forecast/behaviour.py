"""How sparse a model is and how much its tokens share: by its fitted store, or as published.

    named     share of a layer's neurons that its predictor names for a token
    missed    of those, the share that a cache of some size does not have

The figures of a family that was published stand in for those of a model that is not fitted yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.forecast.source import Described
from common.lowrank import REPORT, named_shares
from common.store.store import Store

RANK_MAX, RANK_SHARE = 128, 8  # of predictors that are not there yet: 1/8 of the width, up to 128


@dataclass(frozen=True)
class Published:
    """What was published of a family. Shares of a layer's neurons."""

    fired: float
    named: float
    cached: float  # that a window holds ...
    new: float  # ... and what a token reads beside it
    source: str


PUBLISHED = {
    "opt": Published(0.033, 0.10, 0.24, 0.024, "OPT 6.7B in LLM in a flash (arXiv 2312.11514)"),
    "llama": Published(
        0.10, 0.20, 0.48, 0.048,
        "Llama 2 7B with FATReLU in LLM in a flash (arXiv 2312.11514): one neuron in ten fires;"
        " named is the two for each that `inflash fit` allows, reuse OPT 6.7B's for what is named",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Behaviour:
    """Shares of each layer's neurons, [layers]."""

    fired: tuple[float, ...]
    named: tuple[float, ...]
    misses: tuple[tuple[float, ...], ...] | None  # per layer, at `shares`; None: as published
    shares: tuple[float, ...]
    fitted: bool  # sparsity is the store's own
    measured: bool  # reuse is, too
    source: str

    def missed(self, layer: int, cached: float) -> float:
        """Of what the layer names, the share that is not among the `cached` share of neurons."""
        if self.misses is None:
            # Falls by half as the cache grows by so many times what is named, and is 0 at all.
            left = math.exp(-cached / (_reach(self.shares) * self.named[layer]))
            return max(left - cached * math.exp(-1 / (_reach(self.shares) * self.named[layer])), 0)
        points = (0.0, *self.shares, 1.0)
        return float(np.interp(cached, points, (1.0, *self.misses[layer], 0.0)))


def _reach(published: Sequence[float]) -> float:
    """Of published named, cached and new: caches by what is named, for a factor e in misses."""
    named, cached, new = published
    return cached / named / math.log(named / new)


def behaviour_of(model: Described) -> Behaviour:
    """A model's own figures as far as it is fitted, else its family's."""
    published = PUBLISHED[model.family]
    reuse = (published.named, published.cached, published.new)
    named = named_shares(model.store) if model.store else None
    layers = model.geometry.layers
    if named is None or model.store is None:
        return Behaviour(
            (published.fired,) * layers, (published.named,) * layers, None, reuse,
            fitted=False, measured=False, source=f"as published: {published.source}",
        )  # fmt: skip
    fired, misses, shares = _report(model.store)
    if misses is None:
        return Behaviour(
            fired, tuple(named), None, reuse, fitted=True, measured=False,
            source=f"sparsity: the fitted store's report; reuse: {published.source}",
        )  # fmt: skip
    return Behaviour(
        fired, tuple(named), misses, shares, fitted=True, measured=True,
        source="sparsity and reuse: the fitted store's report, of held-out text",
    )  # fmt: skip


def _report(
    store: Store,
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...] | None, tuple[float, ...]]:
    """What fires, and the misses where the fit counted them. `named_shares` checked the rest."""
    report = json.loads((store.path / REPORT).read_bytes())
    rows = report["layers"]
    fired = tuple(float(row["active"]) for row in rows)
    shares = tuple(float(share) for share in report.get("cache_shares", ()))
    if not shares or any(len(row.get("misses", ())) != len(shares) for row in rows):
        return fired, None, ()  # planted, or fitted by an older version
    return fired, tuple(tuple(map(float, row["misses"])) for row in rows), shares


def predictor_bytes(model: Described) -> int:
    """What predictors that are not fitted yet will take in memory: int8 factors and biases."""
    geometry = model.geometry
    rank = min(RANK_MAX, geometry.hidden // RANK_SHARE)
    factors = rank * (2 * geometry.neurons + 4 * geometry.hidden)
    return geometry.layers * (factors + 2 * 4 * geometry.neurons * 2)
