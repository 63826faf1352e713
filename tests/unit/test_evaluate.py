"""The figures of `inflash eval` against a count by hand, neuron by neuron."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from common.evaluate import (
    Count,
    Counting,
    Demand,
    Evaluation,
    Found,
    Served,
    add_stats,
    add_up,
    demand_by_layer,
)
from common.lowrank import AHEAD_PARTS, Factors, Floats, Kind
from common.spans import COUNTS, Span
from inflash._messages import Stats

LAYERS, NEURONS, HIDDEN, RANK = 3, 21, 6, 4  # 21: the last byte of bits is not full
WINDOWS, LENGTH = 5, 7


def factors_of(rng: np.random.Generator, features: int) -> Factors:
    shapes = (RANK, features), (NEURONS, RANK), (NEURONS,)
    return Factors.of(*(rng.standard_normal(shape, np.float32) for shape in shapes))


class Text:
    """Random inputs of every layer, [windows, length, hidden], and what fires."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.factors: dict[Kind, list[Factors]] = {
            "same": [factors_of(rng, HIDDEN) for _ in range(LAYERS)],
            "ahead": [factors_of(rng, AHEAD_PARTS * HIDDEN) for _ in range(LAYERS)],
        }
        shape = (WINDOWS, LENGTH, HIDDEN)
        self.x = {layer: rng.standard_normal(shape, np.float32) for layer in range(-1, LAYERS)}
        self.fired = rng.random((LAYERS, WINDOWS, LENGTH, NEURONS)) < 0.3

    def observed(self, windows: slice) -> Iterator[tuple[int, Floats, Any]]:
        """What a streamed model tells of some windows in a forward pass."""
        for layer, x in self.x.items():
            bits = None
            if layer >= 0:
                fired = self.fired[layer, windows].reshape(-1, NEURONS)
                bits = np.packbits(fired, axis=1, bitorder="little")
            yield layer, x[windows].reshape(-1, HIDDEN).copy(), bits

    def by_hand(self, kind: Kind, layer: int) -> Count:
        """As a server does it: token by token, neuron by neuron."""
        active = silent = named = found = 0
        for window in range(WINDOWS):
            for token in range(0 if kind == "same" else 1, LENGTH):
                own, before = self.x[layer][window], self.x[layer - 1][window]
                features = own[token][None]
                if kind == "ahead":
                    parts = [before[token], before[token - 1], own[token - 1]]
                    features = np.concatenate(parts)[None]
                ids = set(self.factors[kind][layer].name(features).tolist())
                for neuron in range(NEURONS):
                    fires = bool(self.fired[layer, window, token, neuron])
                    active += fires
                    silent += not fires
                    named += neuron in ids
                    found += fires and neuron in ids
        return Count(active, silent, named, found)


@pytest.mark.parametrize("batch", [1, 2, WINDOWS])
def test_counts_are_those_by_hand(batch: int) -> None:
    text = Text(seed=batch)
    counting = Counting(text.factors, LENGTH)
    for first in range(0, WINDOWS, batch):
        for layer, x, bits in text.observed(slice(first, first + batch)):
            counting.observe(layer, x, bits)
            x[:] = np.nan  # the model's own: it may be gone when the next layer comes
    kinds: tuple[Kind, ...] = ("same", "ahead")
    for kind in kinds:
        found = getattr(counting, kind)
        assert found == [text.by_hand(kind, layer) for layer in range(LAYERS)]
        assert all(0 < count.found < count.active for count in found), "a dull text"


def test_shares_are_of_sums() -> None:
    total = add_up([Count(active=8, silent=2, named=4, found=4), Count(2, 28, 11, 1)])
    assert total == Count(active=10, silent=30, named=15, found=5)
    assert total.active_share == 0.25
    assert total.recall == 0.5
    assert total.false_negatives == 0.5
    assert total.false_positives == pytest.approx(1 / 3)
    assert total.named_per_active == 1.5


def test_a_share_of_nothing_is_none() -> None:
    count = Count(silent=5, named=2)
    assert (count.recall, count.false_negatives, count.named_per_active) == (None, None, None)
    assert count.false_positives == 0.4
    assert Demand(steps=3).late_fraction is None


def layer_span(request: int, step: int, layer: int, hits: int, misses: int, rows: int = 1) -> Span:
    counts = {"fired": hits, "late_fired": misses // 2, "hits": hits, "misses": misses}
    counts |= {"prefetched": 1, "wasted_bytes": 4096, "rows": rows}
    return Span("layer", request, step, layer, 0, 1, tuple(counts.get(c, 0) for c in COUNTS))


def test_late_neurons_are_counted_after_the_prompt() -> None:
    spans = [
        layer_span(1, 100, 0, 1000, 1000),  # the prompt's step, of one token
        layer_span(1, 100, 1, 1000, 1000),
        Span("step", 1, 100, -1, 0, 1, (1,)),
        layer_span(1, 101, 0, 6, 2),
        layer_span(1, 101, 1, 3, 1),
        layer_span(2, 102, 0, 1000, 1000, rows=20),  # a longer prompt, in two steps
        layer_span(2, 103, 0, 1000, 1000, rows=20),
        layer_span(2, 104, 0, 3, 1),
    ]
    assert demand_by_layer(spans, layers=3) == [
        Demand(2, fired=9, late_fired=1, hits=9, misses=3, prefetched=2, wasted_bytes=8192),
        Demand(1, fired=3, late_fired=0, hits=3, misses=1, prefetched=1, wasted_bytes=4096),
        Demand(),
    ]
    assert demand_by_layer(spans, layers=3)[0].late_fraction == 1 / 9
    assert demand_by_layer(spans, layers=3)[0].waited_fraction == 0.25


def test_figures_of_requests_add_up() -> None:
    none = dict.fromkeys((field.name for field in dataclasses.fields(Stats)), 0)
    first = Stats(**none | {"new_tokens": 5, "decode_bytes_read": 400, "decode_hits": 3})
    second = Stats(**none | {"new_tokens": 3, "decode_bytes_read": 800, "decode_misses": 1})
    total = add_stats([first, second])
    assert total.decode_bytes_per_token == 1200 / 6
    assert total.decode_hit_rate == 0.75


def test_a_server_that_did_not_run_has_no_figures() -> None:
    none = dict.fromkeys((field.name for field in dataclasses.fields(Stats)), 0)
    dense = Found(np.ones((2, 3)), np.array([[1, 2, 3], [4, 5, 6]]))
    demands = [Demand(3, 10, 2, hits=1, misses=1), Demand(3, 10, 1, hits=3, misses=1)]
    served = Served(dense.first(1), Stats(**none | {"new_tokens": 3}), demands, cache_bytes=4096)
    counts = [Count(active=4, silent=4, named=6, found=3), Count(4, 4, 5, 4)]
    found = Evaluation(4, dense, counts, counts, lowrank=served, exact=None).as_object()
    assert found["perplexity"] == {"dense": math.e, "exact": None, "lowrank": math.e}
    assert (found["bytes_per_token"], found["bytes_per_token_exact"]) == (0, None)
    assert (found["tokens"], found["tokens_served"], found["tokens_scored"]) == (8, 4, 3)
    assert (found["late_fraction"], found["late_fraction_layer0"]) == (0.1, 0.2)
    assert (found["waited_fraction"], found["waited_fraction_layer0"]) == (0.25, 0.5)
    assert found["recall"] == {
        "same": 7 / 8, "ahead": 7 / 8, "ahead_after_first": 1.0, "ahead_layer0": 3 / 4,
    }  # fmt: skip
    assert found["layers"][0]["named_per_active"] == {"same": 1.5, "ahead": 1.5}


def test_perplexity_and_agreement() -> None:
    nll = np.log(np.array([[2.0, 8.0], [4.0, 4.0], [1.0, 1.0]], np.float32))
    one = Found(nll, np.array([[1, 2], [3, 4], [5, 6]]))
    other = Found(nll, np.array([[1, 0], [3, 4], [0, 0]]))
    assert one.first(2).perplexity == pytest.approx(4.0)
    assert one.first(2).tokens == 4
    assert one.perplexity == pytest.approx(math.exp(np.log(256.0) / 6))
    assert one.agreement(other) == 0.5
    assert one.first(2).agreement(other.first(2)) == 0.75
