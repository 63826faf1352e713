"""How much tokens share: what a cache would miss, by its size, of what fired in held-out text."""

from __future__ import annotations

import numpy as np

from common.learn.layer import HELD_OUT_SHARE
from common.learn.recording import Recording
from common.learn.windows import split
from common.lowrank import CACHE_SHARES
from common.policy import Decay
from common.replay import Contender, replay, trace_from_bits
from common.store.geometry import Geometry

TOKENS_MAX = 2048
WARM_UP_SHARE = 1 / 4  # of the tokens: they fill the caches and are not counted


def misses_of(recording: Recording, layer: int, geometry: Geometry) -> tuple[float, ...]:
    """For each of CACHE_SHARES of the layer's neurons in a cache: misses for each that fires.

    A window of text follows on another, as one request on another does.
    """
    _, held_out = split(recording.tokens // recording.length, HELD_OUT_SHARE)
    windows = held_out[: max(1, TOKENS_MAX // recording.length)]
    places = (windows[:, None] * recording.length + np.arange(recording.length)).ravel()
    fired = recording.unpack(recording.fired(layer)[places])
    trace = trace_from_bits([fired], geometry.neurons, geometry.stride_bytes)
    policy = Contender("decay", Decay())
    warm_up = int(WARM_UP_SHARE * trace.tokens)
    found = replay(trace, policy, "equal", CACHE_SHARES, warm_up)
    return tuple(round(outcome.misses_per_asked, 4) for outcome in found)
