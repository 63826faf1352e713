"""Fits one layer's two predictors from a recording: rank, factors, and their curve. torch.

Closed form first: the smallest rank of RANKS that reaches the goal on held-out tokens, or the
largest that the size budget has room for. Then refinement, kept only where it names fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from common.learn.closed_form import ClosedForm, Factors, Moments, Pair, moments
from common.learn.curve import Curve, curve_of
from common.learn.recording import Recording
from common.learn.refine import BATCH_TOKENS, refine
from common.learn.windows import split
from common.lowrank import AHEAD_PARTS, Kind, ahead_features
from common.store.geometry import Geometry
from common.store.store import Store

RANKS = (8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024)
HELD_OUT_SHARE = 1 / 8  # of the windows: ranks, refinement and thresholds are judged on them
HELD_OUT_TOKENS_MAX = 16_384
BLOCK_TOKENS = 2048
MOMENT_FLOPS_MAX = 5e12  # of the features' covariance: some 40 s on two cores
SCORES_MAX = 1 << 24  # scores made at once
REFINE_GAIN = 1.2  # a rank that names this many times the goal gets there by refinement: seen

Phase = Literal["closed form", "refinement"]


@dataclass(frozen=True)
class Goal:
    """What a predictor is to reach on held-out text, and with how much."""

    recall: float
    named_per_active: float
    bytes_max: int  # of its factors as float32, as the predictor holds them


@dataclass(frozen=True)
class Fit:
    """A fitted predictor of one layer. The factors are as the file holds them, rounded."""

    kind: Kind
    rank: int
    refined: bool
    factors: Factors
    curve: Curve
    misses: tuple[float, ...] = ()  # of kind same: what common/learn/reuse.py found


class Samples:
    """Tokens of a recording as features and what fired: of one layer and kind."""

    def __init__(self, recording: Recording, layer: int, kind: Kind):
        self._recording = recording
        self._own = recording.x(layer)
        self._before = recording.x(layer - 1) if kind == "ahead" else None
        self._fired = recording.fired(layer)
        kept, held_out = split(recording.tokens // recording.length, HELD_OUT_SHARE)
        self.train = self._tokens(kept)
        some = np.linspace(0, len(held_out) - 1, self._most(len(held_out))).astype(np.int64)
        self.held_out = self._tokens(held_out[some])

    def _most(self, windows: int) -> int:
        return min(windows, max(1, HELD_OUT_TOKENS_MAX // self._recording.length))

    def _tokens(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the windows' tokens; look-ahead needs a token before."""
        first = 0 if self._before is None else 1
        places = np.arange(first, self._recording.length)
        return (windows[:, None] * self._recording.length + places).ravel()

    def features(self, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        """float32 [tokens, d_f]: of look-ahead, `ahead_features`."""
        if self._before is None:
            return self.inputs(tokens)
        now, before = self._before[tokens], self._before[tokens - 1]
        return torch.from_numpy(ahead_features(now, before, self._own[tokens - 1]))

    def inputs(self, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        """float32 [tokens, d]: the layer's FFN input."""
        return torch.from_numpy(self._own[tokens].astype(np.float32))

    def fired(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return self._recording.unpack(self._fired[tokens])

    def pairs(self) -> Iterator[Pair]:
        """Training tokens for the moments: all, or as many as MOMENT_FLOPS_MAX allows."""
        width = self._own.shape[1] * (1 if self._before is None else AHEAD_PARTS)
        most = max(width, int(MOMENT_FLOPS_MAX / (2 * width**2)))
        for first in range(0, min(len(self.train), most), BLOCK_TOKENS):
            tokens = self.train[first : first + BLOCK_TOKENS]
            yield self.features(tokens), self.inputs(tokens)

    def batch(self, numbers: torch.Tensor) -> Pair:
        """Features and what fired, of training tokens by their numbers from 0, for `refine`."""
        tokens = self.train[np.sort(numbers.numpy())]
        return self.features(tokens), torch.from_numpy(self.fired(tokens))

    def curve(self, factors: Factors) -> Curve:
        """The curve over the held-out tokens."""
        rows = max(1, SCORES_MAX // len(factors.bias))
        curves = []
        for first in range(0, len(self.held_out), rows):
            tokens = self.held_out[first : first + rows]
            scores = factors.scores(self.features(tokens)).numpy()
            curves.append(curve_of(scores, self.fired(tokens)))
        return sum(curves[1:], start=curves[0])


def fit_layer(
    store: Store,
    recording: Recording,
    layer: int,
    kind: Kind,
    goal: Goal,
    passes: float,
    progress: Callable[[Phase, float], None],
) -> Fit:
    """Fits one predictor of `layer`. `progress` is told the phase and its share done, 0 to 1."""
    samples = Samples(recording, layer, kind)
    part = store.geometry.parts[0]
    with torch.inference_mode():
        weight = torch.from_numpy(store.rows(layer, part))
        none = np.zeros(store.geometry.neurons, np.float32)
        bias = torch.from_numpy(store.biases(layer).get(part, none))
        form = ClosedForm(
            weight,
            bias,
            store.activation.threshold,
            _finite_moments(samples, store, layer, kind),
            kind == "ahead",
        )
        del weight
        progress("closed form", 0.5)
        start, curve = _choose_rank(form, samples, store.geometry, kind, goal)
    progress("closed form", 1.0)
    if passes <= 0:
        return Fit(kind, len(start.a), False, start, curve)
    # Not in inference mode: its tensors take no gradient.
    start = Factors(start.a.clone(), start.b.clone(), start.bias.clone())
    steps = max(1, int(passes * len(samples.train) / BATCH_TOKENS))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("refinement", done / steps)

    refined = refine(start, len(samples.train), samples.batch, passes, layer, tick).rounded()
    with torch.inference_mode():
        after = samples.curve(refined)
    if _named_at_goal(after, goal) < _named_at_goal(curve, goal):
        return Fit(kind, len(refined.a), True, refined, after)
    return Fit(kind, len(start.a), False, start, curve)


def _finite_moments(samples: Samples, store: Store, layer: int, kind: Kind) -> Moments:
    found = moments(samples.pairs())
    if not found.finite:
        raise UserError(
            f"layer {layer} of {store.path}, {kind}: FFN inputs are not finite for some of the"
            f" text; run `inflash verify {store.path}`, and if nothing is bad there, leave out the"
            " text that the model's numbers overflow on (--text)"
        )
    return found


def _choose_rank(
    form: ClosedForm, samples: Samples, geometry: Geometry, kind: Kind, goal: Goal
) -> tuple[Factors, Curve]:
    for rank in (ranks := ranks_within(geometry, kind, goal.bytes_max)):
        factors = form.factors(rank).rounded()
        curve = samples.curve(factors)
        good = _named_at_goal(curve, goal) <= REFINE_GAIN * goal.named_per_active
        if good or rank == ranks[-1]:
            break
    return factors, curve


def ranks_within(geometry: Geometry, kind: Kind, bytes_max: int) -> list[int]:
    """RANKS up to the model's width that the budget has room for; at least the smallest."""
    features = geometry.hidden * (AHEAD_PARTS if kind == "ahead" else 1)
    rank_bytes = 4 * (features + geometry.neurons)
    fits = [r for r in RANKS if r <= geometry.hidden and r * rank_bytes <= bytes_max]
    return fits or [min(RANKS[0], geometry.hidden)]


def _named_at_goal(curve: Curve, goal: Goal) -> float:
    return curve.named_per_active(curve.at_recall(goal.recall))
