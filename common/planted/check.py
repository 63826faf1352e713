"""Measures a planted store against what was planted and what was published for OPT 6.7B.

The model runs once over a stream of tokens that calibration did not see, its layers streamed from
the store (common/model/streamed.py); the predictors are those in the store. What they name is
replayed through cache policies (common/replay.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from common.lowrank import EMBEDDING, REPORT, Factors, Kind, ahead_features, read_predictors
from common.model.streamed import Bits, final_states, load_streamed
from common.planted.layer import SETTLED, fire_rate
from common.planted.noise import token_ids
from common.policy import Decay, Window
from common.replay import Contender, replay, trace_from_bits
from common.store.store import Store

TOKENS = 256
KEEP_BYTES = 256 << 20
UNION_TOKENS = 5
SHARES = (0.10, 0.24)  # of the FFN cached
REPLAYED_LAYERS_MAX = 8  # evenly spaced: all of them tell no more, and take minutes
_CONTENDERS = (
    Contender("window as large as fits", Window(None)),
    Contender("decay", Decay()),
    Contender("optimum", None),
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One figure: what was published for OPT 6.7B, what was planted (with predictions: what
    calibration found of them), and what was measured."""

    what: str
    published: float | None
    planted: float | None
    measured: float


@dataclass
class _Seen:
    """What the run over the stream left of each layer, settled tokens only."""

    fired: list[Mask] = field(default_factory=list)
    named: dict[Kind, list[Mask]] = field(default_factory=lambda: {"same": [], "ahead": []})


def measure(
    store: Store,
    seed: int = 1,
    tokens: int = TOKENS,
    progress: Callable[[int], None] = lambda layer: None,
) -> list[Row]:
    """The table of a planted store, shares of 1 all of them.

    Args:
        store: with planted predictors; `StoreError` without.
        seed: of the stream, not the checkpoint's.
        tokens: of the stream, at most the model's context; the first SETTLED do not count.
        progress: told each layer that is done.
    """
    seen = _run(store, seed, tokens, progress)
    layers = store.geometry.layers
    rates = [float(fired.mean()) for fired in seen.fired]
    wanted = [fire_rate(layer, layers) for layer in range(layers)]
    return [
        Row("neurons that fire", 0.033, float(np.mean(wanted)), float(np.mean(rates))),
        Row("fire in the first layer", 0.016, wanted[0], rates[0]),
        Row("fire in the middle layer", 0.027, wanted[layers // 2], rates[layers // 2]),
        Row("fire in the last layer", 0.054, wanted[-1], rates[-1]),
        *_predicted(store, seen, "same", "", (0.10, 0.05, 0.07)),
        *_predicted(store, seen, "ahead", " by look-ahead", (None, None, None)),
        *_reused(store, seen),
    ]


def _run(store: Store, seed: int, tokens: int, progress: Callable[[int], None]) -> _Seen:
    factors, seen, latest = read_predictors(store), _Seen(), np.empty(0, np.float32)

    def observe(layer: int, x: torch.Tensor, bits: Bits | None) -> None:
        nonlocal latest
        now, before, latest = x.numpy(), latest, x.numpy().copy()
        if layer == EMBEDDING or bits is None:
            return
        fired = np.unpackbits(bits, axis=1, bitorder="little", count=store.geometry.neurons)
        seen.fired.append(fired[SETTLED:].view(np.bool_))
        known = ahead_features(before[SETTLED:], before[SETTLED - 1 : -1], now[SETTLED - 1 : -1])
        seen.named["same"].append(_named(factors["same"][layer], now[SETTLED:]))
        seen.named["ahead"].append(_named(factors["ahead"][layer], known))
        progress(layer)

    model = load_streamed(store, observe, keep_bytes=KEEP_BYTES)
    # Another generator than the calibration's, also where the seeds are the same.
    length = min(tokens, model.config.max_position_embeddings)
    ids = token_ids(seed, "measured", model.config.vocab_size, 1, length)
    final_states(model, ids.numpy())
    return seen


def _named(factors: Factors, features: npt.NDArray[np.float32]) -> Mask:
    named: Mask = factors.scores(features) > 0
    return named


def _predicted(
    store: Store,
    seen: _Seen,
    kind: Kind,
    how: str,
    published: tuple[float | None, float | None, float | None],
) -> list[Row]:
    """Named, false negatives and false positives; what was planted is what calibration found."""
    found = json.loads((store.path / REPORT).read_bytes())["layers"]
    active = [row["active"] for row in found]
    share = np.mean([row["active"] * row[kind]["named_per_active"] for row in found])
    missed = np.average([row[kind]["false_negatives"] for row in found], weights=active)
    wrongly = np.average(
        [row[kind]["false_positives"] for row in found], weights=1 - np.array(active)
    )
    planted = (float(share), float(missed), float(wrongly))
    names = (f"named{how}", f"false negatives{how}", f"false positives{how}")
    measured = _mistakes(np.array(seen.named[kind]), np.array(seen.fired))
    return [Row(*four) for four in zip(names, published, planted, measured, strict=True)]


def _mistakes(named: Mask, fired: Mask) -> tuple[float, float, float]:
    """Share named, share missed of what fired, share named of what did not; all layers together."""
    missed = np.count_nonzero(fired & ~named) / np.count_nonzero(fired)
    wrongly = np.count_nonzero(named & ~fired) / np.count_nonzero(~fired)
    return float(named.mean()), missed, wrongly


def _reused(store: Store, seen: _Seen) -> list[Row]:
    layers = store.geometry.layers
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, REPLAYED_LAYERS_MAX)).astype(int))
    named = seen.named["same"]
    union = float(np.mean([_union(named[layer], UNION_TOKENS) for layer in range(layers)]))
    trace = trace_from_bits(
        [named[layer] for layer in chosen], store.geometry.neurons, store.geometry.stride_bytes,
        names="named",
    )  # fmt: skip
    warmup = trace.tokens // 4
    window = Contender("window", Window(UNION_TOKENS - 1))
    held = replay(trace, window, "equal", [1.0], warmup)[0]
    rows = [
        Row(f"named in {UNION_TOKENS} tokens", 0.24, None, union),
        Row(f"cached by a window of {UNION_TOKENS - 1} tokens", 0.24, None, held.held_share),
        Row("new per token in it", 0.024, None, held.ffn_share_per_token),
    ]
    for contender in _CONTENDERS:
        for outcome in replay(trace, contender, "equal", SHARES, warmup):
            what = f"misses per named neuron, {outcome.share:.0%} cached, {contender.name}"
            rows.append(Row(what, None, None, outcome.misses_per_asked))
    return rows


def _union(named: Mask, tokens: int) -> float:
    """Share of the neurons that are named for any of `tokens` in a row, on average."""
    starts: Sequence[int] = range(0, len(named) - tokens + 1, tokens)
    return float(np.mean([named[first : first + tokens].any(axis=0).mean() for first in starts]))
