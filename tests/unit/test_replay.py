"""Traces and their replay: against brute force, an independent LRU, and by example."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import common.replay as module
from common.policy import Decay, Window
from common.replay import (
    SCOPES,
    Contender,
    Outcome,
    Trace,
    TraceError,
    load_trace,
    replay,
    save_trace,
    slots_per_pool,
    trace_from_bits,
)
from scripts.policies import CONTENDERS, OPTIMUM, main

STRIDE_BYTES = 4096


def make_trace(layers: list[list[set[int]]], neurons: int) -> Trace:
    """`layers`: for each layer, for each token what it asks for."""
    bits = np.zeros((len(layers), len(layers[0]), neurons), np.bool_)
    for layer, tokens in enumerate(layers):
        for token, ids in enumerate(tokens):
            bits[layer, token, sorted(ids)] = True
    return trace_from_bits(list(bits), neurons, STRIDE_BYTES)


def random_trace(layers: int, neurons: int, tokens: int, seed: int) -> Trace:
    """A few neurons are asked for often, as in a model; layers differ in how many they ask for."""
    rng = np.random.default_rng(seed)
    bits = [
        rng.random((tokens, neurons)) < rng.beta(0.3, 2, neurons) * (1 + layer) / layers
        for layer in range(layers)
    ]
    return trace_from_bits(bits, neurons, STRIDE_BYTES)


def misses(trace: Trace, contender: Contender, slots: int, scope: str = "equal") -> int:
    """Of the whole trace, with `slots` in each layer."""
    share = slots / trace.neurons
    outcome = replay(trace, contender, scope, [share], warmup=0)[0]
    assert outcome.slots == slots * trace.layers
    return round(outcome.bytes_per_token * trace.tokens / STRIDE_BYTES)


LISTS = st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=7)


def fewest_misses(events: list[set[int]], slots: int) -> int:
    """By trying everything that a cache may keep: all that was asked for if it has the room."""

    @cache
    def rest(at: int, held: frozenset[int]) -> int:
        if at == len(events):
            return 0
        asked = frozenset(events[at])
        if len(asked) >= slots:
            keeps = [frozenset(some) for some in combinations(sorted(asked), slots)]
        else:
            others = sorted(held - asked)
            room = min(slots - len(asked), len(others))
            keeps = [asked | frozenset(some) for some in combinations(others, room)]
        return len(asked - held) + min(rest(at + 1, keep) for keep in keeps)

    return rest(0, frozenset())


@given(LISTS, st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_optimum_is_the_fewest_misses_there_can_be(events: list[set[int]], slots: int) -> None:
    assert misses(make_trace([events], 6), OPTIMUM, slots) == fewest_misses(events, slots)


@given(LISTS, LISTS, st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_optimum_of_shared_slots(one: list[set[int]], two: list[set[int]], slots: int) -> None:
    tokens = min(len(one), len(two))
    trace = make_trace([one[:tokens], two[:tokens]], 6)
    events = [
        ids
        for first, second in zip(one, two, strict=False)
        for ids in (first, {neuron + 6 for neuron in second})
    ]
    assert misses(trace, OPTIMUM, slots, "global") == fewest_misses(events, 2 * slots)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_policy_beats_the_optimum(scope: str) -> None:
    trace, shares = random_trace(3, 40, 40, seed=0), [0.05, 0.2, 0.5, 1.0]
    best = replay(trace, OPTIMUM, scope, shares, warmup=10)
    for contender in CONTENDERS:
        for mine, bound in zip(
            replay(trace, contender, scope, shares, warmup=10), best, strict=True
        ):
            assert mine.misses_per_asked >= bound.misses_per_asked, contender.name
            assert mine.held_share <= mine.slots / 120 + 1e-9


def plain_lru(trace: Trace, slots: int) -> int:
    """Of one layer whose tokens ask for less than the slots: the longest unused leaves."""
    held: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for token in range(trace.tokens):
        for neuron in trace.asked(token, 0).tolist():
            missed += neuron not in held
            held[neuron] = None
            held.move_to_end(neuron)
        while len(held) > slots:
            held.popitem(last=False)
    return missed


@pytest.mark.parametrize("seed", range(5))
def test_window_auto_is_lru(seed: int) -> None:
    # One neuron a token: neurons of one token would be equally old, and either may leave.
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.5, 300) % 30
    trace = make_trace([[{int(neuron)} for neuron in ids]], 30)
    for slots in (2, 7, 20):
        assert misses(trace, Contender("", Window(None)), slots) == plain_lru(trace, slots)


def test_window_keeps_a_neuron_for_its_tokens_and_no_longer() -> None:
    two = Contender("", Window(2))
    assert misses(make_trace([[{0}, set(), {0}]], 4), two, 4) == 1
    assert misses(make_trace([[{0}, set(), set(), {0}]], 4), two, 4) == 2
    # Each use starts the tokens anew.
    assert misses(make_trace([[{0}, set(), {0}, set(), {0}]], 4), two, 4) == 1


def test_window_leaves_slots_unused() -> None:
    trace = make_trace([[{0}, {1}, {2}, {3}, {4}, {5}]], 8)
    outcome = replay(trace, Contender("", Window(1)), "equal", [1.0], warmup=2)[0]
    assert outcome.held_share == 2 / 8  # this token's neuron and the last one's


def test_window_makes_room_within_itself_if_it_must() -> None:
    trace = make_trace([[{0}, {1}, {2}, {1}, {0}]], 8)
    assert misses(trace, Contender("", Window(8)), 2) == 4


def test_keys_that_are_kept_know_a_neuron_again() -> None:
    """Neuron 0 was used often, is evicted and comes back: it outlives 5, used three times."""
    often: list[set[int]] = [{0}] * 6
    events = [*often, {1, 2, 3}, {5}, {5}, {5}, {0}, {6, 7}, {0}]
    trace = make_trace([events], 8)
    kept = misses(trace, Contender("", Decay(8.0)), 3)
    assert kept < misses(trace, Contender("", Decay(8.0), forget=True), 3)


def test_first_in_leaves_first_though_it_is_used() -> None:
    first_in = next(c for c in CONTENDERS if c.name == "first in")
    trace = make_trace([[{0}, {1}, {0}, {2}, {0}]], 4)
    assert misses(trace, first_in, 2) == 4
    assert misses(trace, Contender("", Window(None)), 2) == 3


def test_an_event_larger_than_the_cache_passes_through() -> None:
    """The neuron with the highest key stays: of 0 to 3, the one that was used before."""
    trace = make_trace([[{2}, {2}, {0, 1, 2, 3}, {2}]], 4)
    assert misses(trace, Contender("", Decay(8.0)), 1) == 4


class Lots:
    """Keys by lot: they fall as well as rise, and no two are equal, so nobody may choose."""

    def __init__(self) -> None:
        self._lots = np.random.default_rng(0)

    def used(self, keys: np.ndarray, now: int) -> np.ndarray:
        return self._lots.random(len(keys))

    def floor(self, now: int) -> float:
        return -np.inf


def test_large_pools_do_what_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, shares = random_trace(2, 600, 40, seed=1), [0.1, 0.3, 0.6]

    def both() -> list[list[Outcome]]:
        contenders = OPTIMUM, Contender("lots", Lots())
        return [replay(trace, contender, "global", shares, warmup=4) for contender in contenders]

    small = both()
    monkeypatch.setattr(module, "_LARGE_NEURONS", 0)
    assert both() == small


def test_figures_of_an_example() -> None:
    # The first token is not counted. The second misses neuron 1, the third nothing.
    trace = make_trace([[{0}, {0, 1}, {1}], [set(), {3}, {3}]], 4)
    outcome = replay(trace, Contender("mine", Window(None)), "equal", [0.5], warmup=1)[0]
    assert outcome.slots == 4
    assert outcome.misses_per_asked == 2 / 5
    assert outcome.bytes_per_token == 2 * STRIDE_BYTES / 2
    assert outcome.ffn_share_per_token == 2 / 2 / 8
    assert outcome.held_share == 3 / 8


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(1, 40), st.floats(0.01, 1)
)
def test_every_scope_has_as_many_slots(counts: list[int], neurons: int, share: float) -> None:
    firsts = tuple(np.array([0, count]) for count in counts)
    ids = tuple(np.zeros(count, np.uint16) for count in counts)
    trace = Trace("fired", neurons, STRIDE_BYTES, np.zeros(1, np.int64), ids, firsts)
    sums = {sum(slots_per_pool(trace, scope, share)) for scope in SCOPES}
    assert len(sums) == 1
    by_use = slots_per_pool(trace, "use", share)
    assert 1 <= min(by_use) <= max(by_use) <= neurons
    for a, slots in enumerate(by_use):
        for b, others in enumerate(by_use):
            if counts[a] > counts[b]:
                assert slots >= others, "who is asked for more has no fewer slots"


@pytest.mark.parametrize("neurons", [5, 16, 70_000])
@pytest.mark.parametrize("packed", [True, False])
def test_round_trip(neurons: int, packed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(neurons)
    bits = [rng.random((6, neurons)) < 0.3 for _ in range(3)]
    bits[1][2] = False  # a token that asks for nothing
    given_bits = [np.packbits(rows, axis=1) for rows in bits] if packed else bits
    trace = trace_from_bits(given_bits, neurons, 8192, [0, 4], "named")
    path = tmp_path / "a.trace"
    save_trace(trace, path)
    read = load_trace(path)
    assert (read.names, read.neurons, read.stride_bytes) == ("named", neurons, 8192)
    assert (read.layers, read.tokens, read.starts.tolist()) == (3, 6, [0, 4])
    for layer, rows in enumerate(bits):
        for token, row in enumerate(rows):
            assert read.asked(token, layer).tolist() == np.flatnonzero(row).tolist()


def test_bits_of_another_shape_are_refused() -> None:
    for bad in (np.zeros((3, 9), np.bool_), np.zeros((3, 8), np.uint8), np.zeros((3, 8))):
        with pytest.raises(TraceError, match=r"layer 0: .* no bits of 8 neurons"):
            trace_from_bits([bad], 8, STRIDE_BYTES)
    with pytest.raises(TraceError, match="layer 1 has other tokens"):
        trace_from_bits([np.zeros((3, 8), bool), np.zeros((4, 8), bool)], 8, STRIDE_BYTES)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        load_trace(path)
    path.write_bytes(b"not at all")
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        load_trace(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other.txt", "x")
    with pytest.raises(TraceError, match="no whole trace"):
        load_trace(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TraceError, match="one array"):
        load_trace(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer1_ids", None, "no whole trace"),
        ("header", np.array(json.dumps({"format": 9})), "format 9, and this reads format 1"),
        ("header", np.array("{"), "cannot be read"),
        ("header", np.array("{}"), "no whole trace"),
        ("header", np.array("[]"), "cannot be read"),
        ("layer0_ids", np.array([0, 2, 1, 9, 0], np.uint16), "outside 0 to 3"),
        ("layer0_ids", np.array([2, 0, 1, 3, 0], np.uint16), "do not ascend"),
        ("layer0_firsts", np.array([0, 2, 9]), "do not cut its 5 ids"),
        ("layer0_firsts", np.array([0, 2, 3, 5]), "other tokens"),
        ("layer0_firsts", np.array([], np.int64), "do not cut its 5 ids"),
        ("starts", np.array([0, 2]), "starts outside"),
    ],
)
def test_a_damaged_trace_is_refused(
    key: str, value: np.ndarray | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.npz"
    save_trace(make_trace([[{0, 2}, {0, 1, 3}], [{1}, {2}]], 4), path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays[key] = value
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(TraceError, match=said):
        load_trace(path)


def test_a_warm_up_of_everything_is_refused() -> None:
    with pytest.raises(TraceError, match="leaves none of the trace's 2"):
        replay(make_trace([[{0}, {1}]], 4), OPTIMUM, "equal", [0.5], warmup=2)


def test_command(tmp_path: Path) -> None:
    path, figures = tmp_path / "x.npz", tmp_path / "x.json"
    save_trace(random_trace(2, 32, 40, seed=1), path)
    options = ["--sizes", "25,50", "--policy", "decay 8", "--policy", "window 4"]
    result = CliRunner().invoke(main, [str(path), *options, "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "decay 8" in result.stdout
    report = json.loads(figures.read_text())
    assert report["warmup_tokens"] == 4
    assert len(report["outcomes"]) == 3 * 3 * 2
    assert all(outcome["over_optimum"] >= 1 for outcome in report["outcomes"])


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_command_looks_where_it_will_write_first(option: str, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "x.png"
    result = CliRunner().invoke(main, [str(tmp_path / "none.npz"), option, str(out)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {out} cannot be written: there is no folder")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a full drive: Linux")
def test_command_on_a_full_drive(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_trace(random_trace(2, 32, 40, seed=1), path)
    options = ["--sizes", "25", "--policy", "decay 8", "--json", "/dev/full"]
    result = CliRunner().invoke(main, [str(path), *options])
    assert result.exit_code == 1
    assert "decay 8" in result.stdout
    assert "error: /dev/full cannot be written: No space left on device; free" in result.stderr


def test_command_draws(tmp_path: Path) -> None:
    path, plot = tmp_path / "x.npz", tmp_path / "x.png"
    save_trace(random_trace(2, 32, 40, seed=1), path)
    options = ["--sizes", "25,50", "--policy", "decay 8", "--plot", str(plot)]
    assert CliRunner().invoke(main, [str(path), *options]).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "none.npz")])
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "none.npz" in result.stderr
    for sizes in ("0,5", "5;6", "101"):
        assert CliRunner().invoke(main, ["x", "--sizes", sizes]).exit_code == 2
