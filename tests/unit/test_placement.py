"""Placement: which order is found, what a cache misses, and how many reads an order takes."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

import common.model.placement as placement
from common.errors import UserError
from common.lowrank import AHEAD_PARTS, PICTURE, PREDICTORS, REPORT, Kind, tensor_name
from common.model.placement import check_fits, count_reads, missed, order_of, order_of_layer
from common.policy import Decay
from common.replay import Contender, Trace, replay, save_trace, trace_from_bits
from common.store.store import Store

Bits = np.ndarray
KINDS: tuple[Kind, ...] = ("same", "ahead")


def made_up_trace(store: Store, seed: int = 0) -> Trace:
    shape = store.geometry
    random = np.random.default_rng(seed)
    bits = random.random((shape.layers, 60, shape.neurons)) < 0.1
    return trace_from_bits(list(bits), shape.neurons, shape.stride_bytes)


def write_trace(store: Store, path: Path, seed: int = 0) -> Path:
    save_trace(made_up_trace(store, seed), path)
    return path


def write_predictors(store: Store, rank: int = 3) -> None:
    """Predictors of random numbers, in the files that `inflash fit` writes."""
    random, shape = np.random.default_rng(1), store.geometry
    tensors: dict[str, Any] = {}
    for layer in range(shape.layers):
        for kind in KINDS:
            features = shape.hidden * (AHEAD_PARTS if kind == "ahead" else 1)
            sizes = {"a": (rank, features), "b": (shape.neurons, rank), "bias": (shape.neurons,)}
            for field, size in sizes.items():
                dtype = np.float32 if field == "bias" else np.float16
                tensors[tensor_name(layer, kind, field)] = random.normal(size=size).astype(dtype)
    save_file(tensors, store.path / PREDICTORS, {"store": store.id})
    digest = hashlib.sha256((store.path / PREDICTORS).read_bytes()).hexdigest()
    report = {"store": store.id, "sha256": digest, "layers": [{"layer": 0, "active": 0.25}]}
    (store.path / REPORT).write_text(json.dumps(report))
    (store.path / PICTURE).write_bytes(b"a picture")


def families(shuffle: bool = True) -> tuple[Bits, list[set[int]]]:
    """Bits of 400 tokens, each of which asks for one of eight families of 12 neurons of 120; and
    the families. The last 24 neurons are asked for by nobody."""
    random = np.random.default_rng(5)
    neurons = random.permutation(96) if shuffle else np.arange(96)
    groups = neurons.reshape(8, 12)
    bits = np.zeros((400, 120), np.bool_)
    for row in bits:
        row[groups[random.integers(8)]] = True
    return bits, [set(group.tolist()) for group in groups]


def trace_of(bits: Bits) -> Trace:
    return trace_from_bits([bits], bits.shape[1], 4096)


def in_one_piece(order: np.ndarray, group: set[int]) -> bool:
    places = np.flatnonzero(np.isin(order, list(group)))
    return bool(places[-1] - places[0] == len(group) - 1)


def test_what_is_missed_together_lies_together() -> None:
    bits, groups = families()
    order = order_of(bits)
    assert all(in_one_piece(order, group) for group in groups)
    assert count_reads(bits, order) == len(bits)
    assert count_reads(bits, np.arange(120, dtype=np.int32)) > 5 * len(bits)


def test_who_is_never_asked_for_lies_last() -> None:
    bits, _ = families()
    assert order_of(bits)[96:].tolist() == list(range(96, 120))
    assert order_of(np.zeros((3, 5), np.bool_)).tolist() == [0, 1, 2, 3, 4]
    assert order_of(np.ones((3, 1), np.bool_)).tolist() == [0]


def test_hot_neurons_that_are_cached_part_no_one() -> None:
    bits, groups = families()
    hot = [min(group) for group in groups]
    bits[:, hot] = True  # everyone's closest friends
    cold = [group - set(hot) for group in groups]
    by_use = order_of_layer(trace_of(bits), 0, share=0.2)
    assert all(in_one_piece(by_use, group) for group in cold)
    by_activation = order_of(bits)
    found = missed(trace_of(bits), 0, 0.2)[40:]
    assert count_reads(found, by_use) < count_reads(found, by_activation)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (7, 11), (50, 1000)])
def test_an_order_depends_on_no_block(
    rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = np.random.default_rng(1).random((150, 60)) < 0.2
    whole = order_of(bits)
    monkeypatch.setattr(placement, "_ROWS", rows)
    monkeypatch.setattr(placement, "_TOKENS", tokens)
    assert order_of(bits).tolist() == whole.tolist()


@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 40))))
def test_an_order_names_every_neuron_once_and_begins_with_the_heaviest_pair(bits: Bits) -> None:
    order = order_of(bits)
    assert sorted(order.tolist()) == list(range(bits.shape[1]))
    together = bits.astype(int).T @ bits
    np.fill_diagonal(together, 0)
    neighbours = [int(together[a, b]) for a, b in itertools.pairwise(order.tolist())]
    assert max(neighbours, default=0) == together.max()
    # Each pair of neighbours that is missed together spares one read.
    assert count_reads(bits, order) == bits.sum() - sum(neighbours)


@pytest.mark.parametrize("seed", range(10))
def test_no_link_is_left_that_would_spare_a_read(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "CANDIDATES", 2)  # so that it takes many rounds
    bits = np.random.default_rng(seed).random((5, 100)) < 0.06
    order = order_of(bits)
    together = bits.astype(int).T @ bits
    breaks = [i for i in range(1, 100) if not together[order[i - 1], order[i]]]
    paths = [order[a:b] for a, b in itertools.pairwise([0, *breaks, 100])]
    for one, other in itertools.combinations(paths, 2):
        ends = np.ix_([one[0], one[-1]], [other[0], other[-1]])
        assert not together[ends].any()


def brute_reads(bits: Bits, order: list[int]) -> int:
    """Runs of neighbours, token by token."""
    return sum(
        sum(1 for asked, _ in itertools.groupby(order, lambda n: bool(row[n])) if asked)  # noqa: B023
        for row in bits
    )


@given(arrays(np.bool_, st.tuples(st.integers(1, 8), st.integers(1, 12))), st.randoms())
def test_reads_are_runs_of_neighbours(bits: Bits, random: object) -> None:
    order = list(range(bits.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert count_reads(bits, np.array(order, np.int32)) == brute_reads(bits, order)


def skewed(tokens: int, neurons: int, layers: int) -> Trace:
    """Some neurons are asked for often, most seldom; layers differ in how much."""
    random = np.random.default_rng(3)
    rates = (
        0.4 * random.random((layers, 1, neurons)) ** 4 * np.linspace(0.5, 1, layers)[:, None, None]
    )
    return trace_from_bits(list(random.random((layers, tokens, neurons)) < rates), neurons, 4096)


def test_a_miss_is_what_the_replay_of_the_same_cache_misses() -> None:
    trace = skewed(300, 200, 3)
    for share in (0.1, 0.3):
        (outcome,) = replay(trace, Contender("decay", Decay()), "use", [share], 30)
        found = sum(np.count_nonzero(missed(trace, n, share)[30:]) for n in range(3))
        asked = sum(int(f[-1] - f[30]) for f in trace.firsts)
        assert found / asked == pytest.approx(outcome.misses_per_asked, rel=0.01)


def test_misses_token_by_token() -> None:
    # Slots for two of ten. 0 and 1 are asked for twice: when 2 comes, it is the one to leave.
    asked = [[0, 1], [0, 1], [2], [0, 1], [2], [3, 4, 5], [3, 4, 5], [5]]
    bits = np.zeros((len(asked), 10), np.bool_)
    for row, ids in zip(bits, asked, strict=True):
        row[ids] = True
    found = [np.flatnonzero(row).tolist() for row in missed(trace_of(bits), 0, 0.2)]
    # 2 takes the place of 0: of equals, the lowest leaves. Of 3, 4, 5 the last two stay.
    assert found == [[0, 1], [], [2], [0], [2], [3, 4, 5], [3], []]


def test_a_trace_of_another_model_is_refused() -> None:
    trace = skewed(5, 20, 2)
    check_fits(trace, 2, 20)
    for layers, neurons in [(3, 20), (2, 21)]:
        with pytest.raises(UserError, match=f"2 layers of 20 .* has {layers} of {neurons}"):
            check_fits(trace, layers, neurons)
