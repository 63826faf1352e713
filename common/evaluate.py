"""Counts for `inflash eval`: how well fitted predictors name what fires, what came late, and how
likely the text was. Pure: takes arrays and log events, returns figures.

Shares are of sums of neurons, over all tokens that are counted, not means of shares. A share of
nothing is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.lowrank import EMBEDDING, Factors, Floats, Kind, ahead_features
from common.spans import Span
from inflash._messages import Stats

Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint8]
T = TypeVar("T")


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Count:
    """Neurons, summed over tokens, by whether they fired and were named. Counts add up."""

    active: int = 0  # fired
    silent: int = 0
    named: int = 0
    found: int = 0  # fired and named

    def __add__(self, other: Count) -> Count:
        return Count(
            self.active + other.active,
            self.silent + other.silent,
            self.named + other.named,
            self.found + other.found,
        )

    @property
    def active_share(self) -> float | None:
        return _share(self.active, self.active + self.silent)

    @property
    def recall(self) -> float | None:
        return _share(self.found, self.active)

    @property
    def false_negatives(self) -> float | None:
        """Share of what fired that was not named."""
        return _share(self.active - self.found, self.active)

    @property
    def false_positives(self) -> float | None:
        """Share of what did not fire that was named."""
        return _share(self.named - self.found, self.silent)

    @property
    def named_per_active(self) -> float | None:
        return _share(self.named, self.active)


def add_up(counts: Iterable[Count]) -> Count:
    return sum(counts, start=Count())


class Counting:
    """An observer of a streamed model (common/model/streamed.py): layers come in order, from -1.

    `same` and `ahead` hold a count per layer. A window's first token has no token before it, so
    that nothing looks ahead for it: `ahead` leaves it out.
    """

    def __init__(self, factors: Mapping[Kind, Sequence[Factors]], length: int):
        """`length`: of a window, in tokens."""
        self._factors = factors
        self._length = length
        self._before: Floats = np.empty((0, 0), np.float32)  # input of the layer before
        self.same = [Count()] * len(factors["same"])
        self.ahead = [Count()] * len(factors["ahead"])

    def observe(self, layer: int, x: Floats, fired: Bits | None) -> None:
        """Counts a layer of some windows, `x` [tokens, hidden]; see `Observe` in streamed.py."""
        if layer != EMBEDDING:
            assert fired is not None
            self._count(layer, x, fired)
        self._before = x.copy()  # the model may write over its own before the next layer comes

    def _count(self, layer: int, x: Floats, fired: Bits) -> None:
        same, ahead = self._factors["same"][layer], self._factors["ahead"][layer]
        for first in range(0, len(x), self._length):  # one by one: scores take room
            window = slice(first, first + self._length)
            own, before = x[window], self._before[window]
            bits = np.unpackbits(fired[window], axis=1, count=len(same.bias), bitorder="little")
            active = bits.view(np.bool_)
            self.same[layer] += count(active, name(same, own))
            features = ahead_features(before[1:], before[:-1], own[:-1])
            self.ahead[layer] += count(active[1:], name(ahead, features))


def name(factors: Factors, features: Floats) -> Bools:
    """[rows, neurons]: which neurons are named for each row of `features`."""
    named: Bools = factors.scores(features) > 0
    return named


def count(active: Bools, named: Bools) -> Count:
    """What two arrays of one shape say of the same neurons."""
    fired = int(active.sum())
    return Count(fired, active.size - fired, int(named.sum()), int((active & named).sum()))


@dataclass(frozen=True)
class Demand:
    """What a layer asked for while tokens were generated, by a server's log."""

    steps: int = 0
    fired: int = 0  # neurons that were needed
    late_fired: int = 0  # of those: neither cached nor prefetched in time
    hits: int = 0  # neurons that were named and there
    misses: int = 0  # neurons that were named and not there
    prefetched: int = 0  # hits that look-ahead brought
    wasted_bytes: int = 0  # prefetched and not asked for

    def __add__(self, other: Demand) -> Demand:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Demand(*(a + b for a, b in pairs))

    @property
    def late_fraction(self) -> float | None:
        return _share(self.late_fired, self.fired)

    @property
    def waited_fraction(self) -> float | None:
        return _share(self.misses, self.hits + self.misses)


def demand_by_layer(spans: Iterable[Span], layers: int) -> list[Demand]:
    """Sums compute's `layer` spans over tokens after each request's prompt."""
    found = [span for span in spans if span.name == "layer"]
    prompt: dict[int, int] = {}  # by request: its first step
    for span in found:
        prompt[span.request] = min(prompt.get(span.request, span.step), span.step)
    demands = [Demand()] * layers
    for span in found:
        if span.field("rows") == 1 and span.step != prompt[span.request]:
            fields = ("fired", "late_fired", "hits", "misses", "prefetched", "wasted_bytes")
            demands[span.layer] += Demand(1, *(span.field(name) for name in fields))
    return demands


def add_stats(stats: Sequence[Stats]) -> Stats:
    """One request's figures in the place of many: sums, `new_tokens` but one of them being those
    that came after a first one, as the decode figures have it."""
    fields = [field.name for field in dataclasses.fields(Stats)]
    sums = {field: sum(getattr(one, field) for one in stats) for field in fields}
    return Stats(**sums | {"new_tokens": sums["new_tokens"] - len(stats) + 1})


@dataclass(frozen=True)
class Found:
    """How a way of computing the model finds some windows of text, beside `Scores` the same.

    `nll` float [windows, length - 1]: the negative log likelihood, in nats, of every token after
    a window's first. `top` int [windows, length - 1]: the token ranked first in its place.
    """

    nll: npt.NDArray[np.floating[Any]]
    top: npt.NDArray[np.integer[Any]]

    @property
    def tokens(self) -> int:
        return self.nll.size

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.mean(dtype=np.float64)))

    def first(self, windows: int) -> Found:
        return Found(self.nll[:windows], self.top[:windows])

    def agreement(self, other: Found) -> float:
        """Share of places in which both rank the same token first."""
        return float((self.top == other.top).mean())


@dataclass(frozen=True)
class Served:
    """What a server with one predictor made of the first windows, fed token by token."""

    found: Found
    stats: Stats  # of all windows together, see `add_stats`
    demands: list[Demand]  # by layer
    cache_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """All that was counted. `dense` is of all windows, `lowrank` and `exact` of the first ones."""

    length: int  # of a window, in tokens
    dense: Found
    same: list[Count]  # by layer, over all windows
    ahead: list[Count]
    lowrank: Served
    exact: Served | None  # None: it does not fit in memory

    def as_object(self) -> dict[str, Any]:
        """The figures as `inflash eval --json` prints them."""
        dense = self.dense.first(len(self.lowrank.found.nll))
        found = self._each(lambda served: served.found)
        stats = self._each(lambda served: served.stats)
        agreement = _map(found, lambda found: found.agreement(dense))
        bytes_read = _map(stats, lambda stats: stats.decode_bytes_per_token)
        demands = self.lowrank.demands
        after_first = sum(demands[1:], start=Demand())
        return {
            "tokens": len(self.dense.nll) * self.length,
            "tokens_served": len(dense.nll) * self.length,
            "tokens_scored": dense.tokens,  # of those served: all but each window's first
            "length": self.length,
            "perplexity": {"dense": dense.perplexity} | _map(found, lambda f: f.perplexity),
            "perplexity_dense_all": self.dense.perplexity,
            "top1_agreement": agreement["lowrank"],
            "top1_agreement_exact": agreement["exact"],
            **self._predicted(),
            "late_fraction": after_first.late_fraction,
            "late_fraction_layer0": demands[0].late_fraction,
            "waited_fraction": after_first.waited_fraction,
            "waited_fraction_layer0": demands[0].waited_fraction,
            "late_tokens": demands[0].steps,  # what the log had of the tokens generated
            "bytes_per_token": bytes_read["lowrank"],
            "bytes_per_token_exact": bytes_read["exact"],
            "hit_rate": _map(stats, lambda stats: stats.decode_hit_rate),
            "hidden_share": _map(stats, lambda stats: stats.decode_hidden_share),
            "tokens_per_s": _map(stats, lambda stats: stats.tokens_per_s),
            "cache_bytes": self._each(lambda served: served.cache_bytes),
            "layers": [self._layer(layer) for layer in range(len(demands))],
        }

    def _each(self, figure: Callable[[Served], T]) -> dict[str, T | None]:
        """A figure of each server, None of one that did not run."""
        exact = None if self.exact is None else figure(self.exact)
        return {"exact": exact, "lowrank": figure(self.lowrank)}

    def _predicted(self) -> dict[str, Any]:
        """Shares over all layers; of look-ahead also without layer 0, and of it alone: it starts
        from the embedding, not from an FFN input."""
        counts = {
            "same": add_up(self.same),
            "ahead": add_up(self.ahead),
            "ahead_after_first": add_up(self.ahead[1:]),
            "ahead_layer0": self.ahead[0],
        }
        return {"active": counts["same"].active_share} | _shares(counts)

    def _layer(self, layer: int) -> dict[str, Any]:
        counts = {"same": self.same[layer], "ahead": self.ahead[layer]}
        demand = self.lowrank.demands[layer]
        return {
            "layer": layer,
            "active": counts["same"].active_share,
            **_shares(counts),
            "late_fraction": demand.late_fraction,
            "waited_fraction": demand.waited_fraction,
            "fired": demand.fired,
            "late_fired": demand.late_fired,
            "hits": demand.hits,
            "misses": demand.misses,
            "prefetched": demand.prefetched,
            "wasted_bytes": demand.wasted_bytes,
        }


def _map(figures: Mapping[str, T | None], make: Callable[[T], float]) -> dict[str, float | None]:
    return {key: None if one is None else make(one) for key, one in figures.items()}


def _shares(counts: Mapping[str, Count]) -> dict[str, dict[str, float | None]]:
    return {
        "recall": {k: c.recall for k, c in counts.items()},
        "false_negatives": {k: c.false_negatives for k, c in counts.items()},
        "false_positives": {k: c.false_positives for k, c in counts.items()},
        "named_per_active": {k: c.named_per_active for k, c in counts.items()},
    }
