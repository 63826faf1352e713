"""Every message between services. Client messages are in inflash/_messages.py.

Times are `time.monotonic_ns()`, one clock for all processes of a machine. Neuron ids and slots are
int32, little-endian, in raw frames. `step` numbers forward passes; it only grows, and no number is
used twice in a server's life, so a message of a step that is over can be told and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from inflash._messages import Sampling, Stats
from inflash._wire import Codec, Raw

SERVICES = ("gateway", "compute", "predictor", "reader")


# all → gateway
@dataclass(frozen=True, slots=True)
class Ready:
    service: str
    pid: int
    protocol: int
    store_id: str


@dataclass(frozen=True, slots=True)
class Health:
    service: str
    pid: int
    uptime_s: float
    beat: int  # grows while the service's loop turns
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a service is about to end. The end itself is observed, never believed."""

    service: str
    pid: int
    reason: str


# gateway → compute
@dataclass(frozen=True, slots=True)
class Admit:
    request: int
    sampling: Sampling
    logits: bool
    prompt: Raw  # int32 [tokens]
    trace: bool = True  # record spans (common/spans.py)


@dataclass(frozen=True, slots=True)
class Abort:
    request: int


# compute → gateway
@dataclass(frozen=True, slots=True)
class Token:
    request: int
    step: int
    token_id: int
    logprob: float
    logits: Raw  # float32 [vocabulary], or empty


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How far a request's prompt is: of its `tokens`, `tokens_done` have gone through all layers,
    and the `block` tokens that follow through `layers_done` of `layers`."""

    request: int
    tokens_done: int  # with those that an earlier request left in the KV cache
    tokens: int
    block: int
    layers_done: int
    layers: int
    eta_s: float  # until the first token, at the pace so far


@dataclass(frozen=True, slots=True)
class Done:
    """The last word of compute on a request; `error` is "" unless the request failed."""

    request: int
    reason: str  # one of FINISH_REASONS, or "failed"
    service: str  # which service failed it, else ""
    error: str
    stats: Stats


# compute → predictor
@dataclass(frozen=True, slots=True)
class Predict:
    """The FFN input of a layer; layer -1 is the embedding, from which layer 0 is looked ahead.

    A block of many tokens needs the `whole` layer: `x` then holds the newest rows only, which the
    next tokens' look-ahead starts from.
    """

    requests: tuple[int, ...]
    newest: tuple[int, ...]  # of each request, which row of x is its newest token
    step: int
    layer: int
    whole: bool
    ahead: bool  # whether to look ahead from it
    x: Raw  # float32 [1 to PREDICT_TOGETHER_MAX rows, hidden]
    trace: bool = True


# predictor → reader
@dataclass(frozen=True, slots=True)
class Fetch:
    """Neurons that a layer waits for (demand), or that it will probably need (prefetch)."""

    request: int  # of a step that requests share, the first
    step: int
    layer: int
    prefetch: bool
    named_ns: int  # when the predictor had named them
    ids: Raw  # int32 neuron ids, ascending; of a prefetch the surest first
    trace: bool = True


# reader → compute
@dataclass(frozen=True, slots=True)
class Cache:
    """Where the cache is: sent once, before anything else. See common/segment.py."""

    path: str
    slots: int  # of all layers together
    stride_bytes: int


@dataclass(frozen=True, slots=True)
class Resident:
    """Part `part` of a layer: these neurons lie in these slots until its Release.

    Part 0 may come before the layer's Fetch, with what look-ahead found and brought; its `left` is
    -1 then. The first part after the Fetch has what else was in the cache, even where that is
    nothing; `left` neurons are still to come. Its reads are those of the layer's prefetch, a later
    part's are its own. Of a layer that is asked for whole, what was in the cache may come as
    several parts, which are `cached`.
    """

    request: int
    step: int
    layer: int
    part: int
    left: int
    cached: bool  # they were there when the Fetch came; else it had to wait for them
    prefetched: int  # of what the cache had for the Fetch, that this step's look-ahead brought
    extra: int  # neurons of the layer so far that the Fetch did not name (setting `extras`)
    reads: int
    bytes_read: int
    wasted_bytes: int  # of what was prefetched for this layer and its Fetch did not name
    read_ns: int  # time in which reads were in flight, since the last Resident
    named_ns: int
    taken_ns: int  # when the reader took the Fetch up
    landed_ns: int  # when this part was complete
    ids: Raw  # int32 neuron ids
    slots: Raw  # int32, in the whole cache, in the ids' order


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The fetch failed: a bundle's checksum or a read is wrong. Nothing more comes of it."""

    request: int
    step: int
    layer: int
    reason: str


# compute → reader
@dataclass(frozen=True, slots=True)
class Attached:
    """Compute has mapped the cache."""

    pid: int


@dataclass(frozen=True, slots=True)
class Release:
    """Compute is done with the slots of a part."""

    step: int
    layer: int
    part: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The step was given up: forget its fetches and release its parts."""

    step: int


HEALTH_CODEC = Codec(Ready, Health, Fault)
CONTROL_CODEC = Codec(Admit, Abort)
ANSWER_CODEC = Codec(Prefilling, Token, Done)
PREDICT_CODEC = Codec(Predict)
FETCH_CODEC = Codec(Fetch)
RESIDENT_CODEC = Codec(Cache, Resident, Unreadable)
RELEASE_CODEC = Codec(Attached, Release, Drop)
