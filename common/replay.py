"""A trace of which neurons each token asked for, and its replay through a cache policy.

A trace is one .npz file; per layer the ids of all tokens lie one after another:

    header        JSON: format, names, neurons, layers, stride_bytes
    starts        int64 [texts], the tokens at which a new text begins
    layer0_ids    uint16 or int32 [asked], ascending within a token
    layer0_firsts int64 [tokens + 1], token t asked for ids[firsts[t] : firsts[t + 1]]

The replay keeps the books of a cache and holds no weights: keys are those of common/policy.py, and
`evict` there chooses who leaves. One event is one token's demand of one layer, token by token and
layer by layer within it. What an event asks for stays until the event is over; if it asks for more
than there are slots, the rest passes through, and those with the highest keys stay.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.policy import NEVER_USED, Keys, Policy, evict, slots_by_use

Ids = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]  # ids, or ids counted through all layers

FORMAT = 1
NAMES = ("fired", "named")  # what a trace's ids are: neurons that fired, or that were predicted
SCOPES = ("equal", "use", "global")
_BLOCK_BYTES = 1 << 26  # of unpacked bits
_LARGE_NEURONS = 4096  # from here on it is faster not to look at all of them


class TraceError(UserError):
    """A file that is no trace, or a trace that cannot be replayed as asked."""


@dataclass(frozen=True)
class Trace:
    """Which neurons each token asked each layer for; the arrays are those of the format."""

    names: str  # what the ids are, one of NAMES
    neurons: int  # per layer
    stride_bytes: int  # of a bundle
    starts: Counts
    ids: tuple[Ids, ...]
    firsts: tuple[Counts, ...]

    @property
    def layers(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.firsts[0]) - 1

    def asked(self, token: int, layer: int) -> Ids:
        """Ascending ids that `token` asked `layer` for."""
        firsts = self.firsts[layer]
        return self.ids[layer][firsts[token] : firsts[token + 1]]


def id_type(neurons: int) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if neurons <= 1 << 16 else np.int32


def trace_from_bits(
    layers: Iterable[npt.NDArray[Any]],
    neurons: int,
    stride_bytes: int,
    starts: Sequence[int] = (0,),
    names: str = "fired",
) -> Trace:
    """A trace of one array per layer: bool [tokens, neurons], or these as `np.packbits(axis=1)`
    packs them, uint8 [tokens, neurons / 8 rounded up]. `TraceError` for other shapes."""
    pairs = [_from_bits(bits, neurons, f"layer {number}") for number, bits in enumerate(layers)]
    ids, firsts = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    trace = Trace(names, neurons, stride_bytes, np.asarray(starts, np.int64), ids, firsts)
    _check(trace, "these bits")
    return trace


def _from_bits(bits: npt.NDArray[Any], neurons: int, where: str) -> tuple[Ids, Counts]:
    packed = bits.dtype == np.uint8
    width = -(-neurons // 8) if packed else neurons
    if bits.ndim != 2 or bits.shape[1] != width or not (packed or bits.dtype == np.bool_):
        raise TraceError(
            f"{where}: {bits.dtype} {list(bits.shape)} are no bits of {neurons} neurons: give bool"
            f" [tokens, {neurons}], or uint8 [tokens, {-(-neurons // 8)}] of np.packbits"
        )
    rows = max(1, _BLOCK_BYTES // neurons)
    parts, counts = [np.empty(0, id_type(neurons))], [np.zeros(1, np.int64)]
    for first in range(0, len(bits), rows):
        block = bits[first : first + rows]
        if packed:
            block = np.unpackbits(block, axis=1, count=neurons).view(np.bool_)
        parts.append(np.nonzero(block)[1].astype(id_type(neurons)))
        counts.append(np.count_nonzero(block, axis=1).astype(np.int64))
    return np.concatenate(parts), np.cumsum(np.concatenate(counts))


def save_trace(trace: Trace, path: Path) -> None:
    """Writes the .npz file; `path` is taken as it is."""
    header = {"format": FORMAT, "names": trace.names, "neurons": trace.neurons}
    header |= {"layers": trace.layers, "stride_bytes": trace.stride_bytes}
    arrays: dict[str, Any] = {"header": np.array(json.dumps(header)), "starts": trace.starts}
    for layer in range(trace.layers):
        arrays[f"layer{layer}_ids"] = trace.ids[layer]
        arrays[f"layer{layer}_firsts"] = trace.firsts[layer]
    with path.open("wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **arrays)


def load_trace(path: Path) -> Trace:
    """Reads what `save_trace` wrote; `TraceError` says what is wrong with anything else."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise TraceError(f"{path}: is one array and no trace")
        with file:
            trace = _read(file, path)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: cannot be read as a trace: {error}") from None
    except KeyError as error:
        raise TraceError(f"{path}: is no whole trace: {error.args[0]}") from None
    _check(trace, str(path))
    return trace


def _read(file: np.lib.npyio.NpzFile, path: Path) -> Trace:
    header = json.loads(str(file["header"]))
    if header["format"] != FORMAT:
        raise TraceError(f"{path}: format {header['format']}, and this reads format {FORMAT}")
    return Trace(
        header["names"], header["neurons"], header["stride_bytes"], file["starts"],
        tuple(file[f"layer{layer}_ids"] for layer in range(header["layers"])),
        tuple(file[f"layer{layer}_firsts"] for layer in range(header["layers"])),
    )  # fmt: skip


def _check(trace: Trace, where: str) -> None:
    if trace.names not in NAMES:
        raise TraceError(f"{where}: ids are {trace.names!r}, which is none of {', '.join(NAMES)}")
    if not trace.layers or trace.neurons < 1 or trace.stride_bytes < 1:
        raise TraceError(f"{where}: no layers, no neurons or a stride of no bytes")
    for layer, (ids, firsts) in enumerate(zip(trace.ids, trace.firsts, strict=True)):
        if len(firsts) != len(trace.firsts[0]):
            raise TraceError(f"{where}: layer {layer} has other tokens than layer 0")
        if (
            not len(firsts)
            or firsts[0] != 0
            or firsts[-1] != len(ids)
            or np.any(np.diff(firsts) < 0)
        ):
            raise TraceError(f"{where}: layer {layer}: firsts do not cut its {len(ids)} ids")
        if len(ids) and not 0 <= ids.min() <= ids.max() < trace.neurons:
            raise TraceError(f"{where}: layer {layer}: an id is outside 0 to {trace.neurons - 1}")
        rises = np.diff(ids.astype(np.int32)) > 0
        rises[firsts[(firsts > 0) & (firsts < len(ids))] - 1] = True  # from token to token
        if not rises.all():
            raise TraceError(f"{where}: layer {layer}: a token's ids do not ascend")
    starts = trace.starts
    if len(starts) and not 0 <= starts.min() <= starts.max() < trace.tokens:
        raise TraceError(f"{where}: a text starts outside its {trace.tokens} tokens")


@dataclass(frozen=True)
class Contender:
    """One line of the comparison. `policy` None is the optimum, which knows the rest of the trace.

    `forget`: a neuron's key starts anew when it was evicted; else it is kept, as the reader does.
    """

    name: str
    policy: Policy | None
    forget: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one contender did with one size of cache in one scope, over the counted tokens."""

    policy: str
    scope: str  # one of SCOPES
    share: float  # of the FFN's neurons, as slots
    slots: int  # of all layers together
    misses_per_asked: float
    bytes_per_token: float
    ffn_share_per_token: float  # of the FFN's neurons, read
    held_share: float  # of the FFN's neurons, resident on average; a window may use fewer slots


class Pools:
    """Caches of several sizes over the same neurons, which see the same events side by side."""

    def __init__(self, neurons: int, slots: Sequence[int]) -> None:
        """`slots` of each cache. In calls, ids count from 0 to `neurons` - 1."""
        self.slots = np.array(slots, np.int64)
        self.resident = np.zeros(len(slots), np.int64)
        # As `evict` wants it: what may not leave, because it is not there or is being asked for.
        self._held = np.ones((len(slots), neurons), np.bool_)
        self._lowest = [_Lowest(neurons) if neurons >= _LARGE_NEURONS else None for _ in slots]

    def ask(self, ids: Places, keys: Keys, floor: float, stale: Mask) -> Counts:
        """One event, `ids` that never repeat. Returns the misses of each cache.

        `keys` [caches, neurons] are those after the event. What is `stale` [ids] left the window
        before it, and is a miss also where nothing took its slot yet. What has a key below `floor`
        leaves with this event.
        """
        absent = self._held[:, ids]
        misses = np.count_nonzero(absent | stale, axis=1)
        self.resident += np.count_nonzero(absent, axis=1)
        over = self.resident - self.slots
        self._held[:, ids] = True
        for cache, lowest in enumerate(self._lowest):
            row, held = keys[cache], self._held[cache]
            if lowest and floor == NEVER_USED:
                gone = lowest.leave(ids, row, held, int(over[cache]))
            elif over[cache] > 0 or floor != NEVER_USED:
                gone = evict(row, held, floor, int(over[cache]))
            else:
                continue
            self._held[cache, gone] = True
            self.resident[cache] -= len(gone)
        self._held[:, ids] = False
        for cache in np.flatnonzero(self.resident > self.slots).tolist():  # the event fills it
            many, none = len(ids) - int(self.slots[cache]), np.zeros(len(ids), np.bool_)
            self._held[cache, ids[evict(keys[cache, ids], none, NEVER_USED, many)]] = True
            self.resident[cache] = self.slots[cache]
        return misses

    def absent(self, ids: Places) -> Mask:
        """[caches, ids]"""
        return self._held[:, ids]


class _Lowest:
    """`evict` of one cache among few candidates, because to look at all takes long in a large pool.

    Whoever is resident and no candidate has a key of `bound` or more. Keys change only by events,
    so each event's ids with a lower key become candidates.
    """

    def __init__(self, neurons: int) -> None:
        self._listed = np.zeros(neurons, np.bool_)
        self._ids = np.empty(0, np.intp)
        self._bound = NEVER_USED

    def leave(self, ids: Places, keys: Keys, held: Mask, want: int) -> Ids:
        """Who leaves after the event `ids`, which are held; `keys` and `held` [neurons]."""
        low = ids[keys[ids] < self._bound]
        low = low[~self._listed[low]]
        if len(low):
            self._listed[low] = True
            self._ids = np.concatenate((self._ids, low))
        gone = self._ids[evict(keys[self._ids], held[self._ids], NEVER_USED, max(want, 0))]
        if want <= 0 or (len(gone) == want and keys[gone].max() <= self._bound):
            return gone
        # The event's own may have the lowest keys, and stay: so many more are listed.
        self._list(np.concatenate((np.flatnonzero(~held), ids)), keys, len(ids) + 8 * want + 256)
        return self._ids[evict(keys[self._ids], held[self._ids], NEVER_USED, want)]

    def _list(self, resident: Places, keys: Keys, count: int) -> None:
        """The candidates are now the `count` of the lowest keys."""
        self._listed[self._ids] = False
        self._ids, self._bound = resident, math.inf
        if count < len(resident):
            self._ids = resident[np.argpartition(keys[resident], count - 1)[:count]]
            self._bound = float(keys[self._ids].max())
        self._listed[self._ids] = True


def slots_per_pool(trace: Trace, scope: str, share: float) -> list[int]:
    """Slots of each pool when the cache holds `share` of the FFN: as many in sum in every scope."""
    each = max(1, int(share * trace.neurons + 1e-9))
    if scope == "equal":
        return [each] * trace.layers
    total = each * trace.layers
    if scope == "global":
        return [total]
    return slots_by_use([len(ids) for ids in trace.ids], total, 1, trace.neurons)


def _next_events(trace: Trace, layer: int) -> npt.NDArray[np.int32]:
    """int32 [asked]: for each of the layer's ids the event that asks for it next; a high number
    if none does. Events of all layers are numbered in their order."""
    ids, firsts = trace.ids[layer], trace.firsts[layer]
    tokens = np.repeat(np.arange(trace.tokens, dtype=np.int32), np.diff(firsts))
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order[:-1]] == ids[order[1:]])
    events = np.full(len(ids), np.iinfo(np.int32).max, np.int32)
    events[order[again]] = tokens[order[again + 1]] * trace.layers + layer
    return events


class _Replay:
    """One contender in one scope: the caches of all sizes, and the keys of their neurons.

    A key outlives its neuron's slot, so one row of keys serves all sizes; keys that are forgotten
    need a row for each.
    """

    def __init__(
        self, trace: Trace, contender: Contender, scope: str, shares: Sequence[float]
    ) -> None:
        self.slots = np.array([slots_per_pool(trace, scope, share) for share in shares])
        caches, self._pools = self.slots.shape
        neurons = trace.neurons * trace.layers // self._pools
        self.pools = [Pools(neurons, slots) for slots in self.slots.T]
        rows = caches if contender.forget else 1
        self._keys = [np.full((rows, neurons), NEVER_USED) for _ in self.pools]
        self._trace, self._contender, self._caches = trace, contender, caches
        self._next = (
            [] if contender.policy else [_next_events(trace, n) for n in range(trace.layers)]
        )

    def event(self, token: int, layer: int) -> tuple[Counts, Counts]:
        """Misses of each cache, and the resident neurons of its pool afterwards."""
        policy, now, floor = self._contender.policy, token + 1, NEVER_USED
        number = layer if self._pools > 1 else 0
        pools, keys = self.pools[number], self._keys[number]
        ids = self._trace.asked(token, layer).astype(np.intp)
        ids += (layer - number) * self._trace.neurons
        old = keys[:, ids]
        if policy is None:
            firsts = self._trace.firsts[layer]
            keys[0, ids] = -self._next[layer][firsts[token] : firsts[token + 1]].astype(np.float64)
        else:
            if self._contender.forget:
                old = np.where(pools.absent(ids), NEVER_USED, old)
            keys[:, ids] = policy.used(old.ravel(), now).reshape(old.shape)
            floor = policy.floor(now)
        every = np.broadcast_to(keys, (self._caches, keys.shape[1]))
        return pools.ask(ids, every, floor, old < floor), pools.resident


def replay(
    trace: Trace,
    contender: Contender,
    scope: str,
    shares: Sequence[float],
    warmup: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Outcome]:
    """What `contender` does in `scope` with caches of `shares` of the FFN's neurons.

    The first `warmup` tokens fill the caches and are not counted. `advance` is told of tokens done.
    """
    if not 0 <= warmup < trace.tokens:
        raise TraceError(f"a warm-up of {warmup} tokens leaves none of the trace's {trace.tokens}")
    run = _Replay(trace, contender, scope, shares)
    misses, held = np.zeros(len(shares), np.int64), np.zeros(len(shares), np.int64)
    for token in range(trace.tokens):
        for layer in range(trace.layers):
            counts = run.event(token, layer)
            if token >= warmup:
                misses += counts[0]
                held += counts[1]
        advance(1)
    tokens, ffn = trace.tokens - warmup, trace.layers * trace.neurons
    asked = sum(int(firsts[-1] - firsts[warmup]) for firsts in trace.firsts)
    totals = [[int(n) for n in row] for row in (run.slots.sum(axis=1), misses, held)]
    # A layer's own pool is looked at once a token, a shared one after every layer's event.
    looks = tokens * trace.layers // len(run.pools)
    return [
        Outcome(
            contender.name, scope, share, slots, missed / max(asked, 1),
            missed * trace.stride_bytes / tokens, missed / tokens / ffn, resident / looks / ffn,
        )
        for share, slots, missed, resident in zip(shares, *totals, strict=True)
    ]  # fmt: skip
