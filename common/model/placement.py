"""Placement: the order of a layer's neurons on flash that needs the fewest reads.

Bundles that lie side by side and are read for the same token are one read (services/reader). So an
order spares as many reads as the neighbours in it are missed together: the sum over neighbours of
the tokens that miss both. What counts is what a cache misses, not what fires: hot neurons fire with
everyone, and are not read. No neuron lies twice.

To find the best order is the travelling salesman's problem. Here the pair that is missed together
most often is linked first, then the next, as long as paths come of it (Ripple's way, arXiv
2410.19274, which counts activations). Improving the paths afterwards, pair by pair, was measured:
it spares 0.1 % of the reads of other text. What helps is a longer trace.

An order is int32 [neurons]: order[place] is the checkpoint's neuron that lies at `place`. In a
store, and so everywhere else, a neuron's id is its place. So the predictors of another store of the
same checkpoint hold for a placed one, once their rows are in its order: `carried`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import StoreError
from common.lowrank import PREDICTORS, Kind, has_predictors, predictor_problem, tensor_name
from common.model.activation import Activation
from common.model.bundling import reordered
from common.model.families import TRANSPOSED
from common.packed import packed
from common.policy import NEVER_USED, Decay, evict
from common.replay import Trace, TraceError, slots_per_pool
from common.store.checksum import Checksums, block_checksums
from common.store.geometry import Geometry
from common.store.manifest import BIASES, RESIDENT_DIR
from common.store.store import Order, Store
from common.store.tensors import Tensor, read_header

Missed = npt.NDArray[np.bool_]

CACHED_SHARE = 0.2  # of the FFN: placed for 20 %, 10 to 50 % read within 1 % of their own optimum
CANDIDATES = 16  # per neuron and round: with 64 the reads are the same to 0.1 %
_ROWS = 512  # neurons whose pairs are counted at once
_TOKENS = 2048  # counted at once
_TIE = 1e-9  # per neuron, in a key's unit, halvings: which of equals leaves is not numpy's choice


def check_fits(trace: Trace, layers: int, neurons: int) -> None:
    """`TraceError` unless `trace` is of a model with so many layers, and neurons in each."""
    if (trace.layers, trace.neurons) != (layers, neurons):
        raise TraceError(
            f"the trace is of {trace.layers} layers of {trace.neurons:,} neurons, the checkpoint"
            f" has {layers} of {neurons:,}: record one of this model"
        )


def order_of_layer(trace: Trace, layer: int, share: float = CACHED_SHARE) -> Order:
    """The order for one layer of `trace`, whose ids are the checkpoint's neurons, with `share` of
    the FFN cached. Takes a byte of memory per token and neuron, and some hundred MB."""
    return order_of(missed(trace, layer, share))


def missed(trace: Trace, layer: int, share: float) -> Missed:
    """bool [tokens, neurons]: what each token asks `layer` for and the cache does not have.

    The cache is the reader's by default: decay, `share` of the FFN, slots by use.
    """
    slots = slots_per_pool(trace, "use", share)[layer]
    policy, neurons = Decay(), trace.neurons
    ties = _TIE * np.arange(neurons)
    keys, absent = np.full(neurons, NEVER_USED), np.ones(neurons, np.bool_)
    found = np.zeros((trace.tokens, neurons), np.bool_)
    resident = 0
    for token in range(trace.tokens):
        ids = trace.asked(token, layer).astype(np.intp)
        new = ids[absent[ids]]
        found[token, new] = True
        keys[ids] = policy.used(keys[ids], token + 1)
        resident += len(new)
        # What the token asks for stays while it is asked for; then, of more than there is room
        # for, those with the highest keys.
        absent[ids] = True
        resident -= _leave(keys + ties, absent, min(resident - slots, resident - len(ids)))
        absent[ids] = False
        resident -= _leave(keys + ties, absent, resident - slots)
    return found


def _leave(keys: npt.NDArray[np.float64], absent: Missed, want: int) -> int:
    """`want` neurons with the lowest keys become absent; returns how many did."""
    if want <= 0:
        return 0
    absent[evict(keys, absent, NEVER_USED, want)] = True
    return want


def order_of(missed: Missed) -> Order:
    """The order of neurons that are `missed`, bool [tokens, neurons], together.

    Those that are never missed are last, ascending. The same on every machine.
    """
    paths = _Paths(missed.shape[1])
    ever = np.flatnonzero(missed.any(axis=0))
    ends = ever
    # A neuron within a path has both neighbours. A round links most; the ends left are few.
    while len(ends) > 1 and paths.link(ends[_heaviest_pairs(missed[:, ends])]):
        ends = ever[[paths.is_end(neuron) for neuron in ever.tolist()]]
    never = np.setdiff1d(np.arange(missed.shape[1]), ever)
    return paths.walk([*ever.tolist(), *never.tolist()])


def _heaviest_pairs(missed: Missed) -> npt.NDArray[np.intp]:
    """[pairs, 2] of columns, lower first: for each column those of the higher ones that are missed
    together with it most often. The heaviest pair first; of equals, that of the lowest columns."""
    count = missed.shape[1]
    weights, pairs = [], []
    for first in range(0, count - 1, _ROWS):
        rows = np.arange(min(_ROWS, count - first))
        together = _together(missed[:, first:], len(rows))
        together[np.tril_indices(len(rows))] = 0
        width = count - first
        best = min(CANDIDATES, width)
        keys = together * width + np.arange(width)[::-1]  # no two of a row are equal
        chosen = np.argpartition(keys, width - best, axis=1)[:, width - best :].ravel()
        mine = np.repeat(rows, best)
        weights.append(together[mine, chosen])
        pairs.append(np.stack((mine, chosen), axis=1) + first)
    weight, pair = np.concatenate(weights), np.concatenate(pairs)
    order = np.lexsort((pair[:, 1], pair[:, 0], -weight))
    return pair[order[: np.count_nonzero(weight)]]


def _together(missed: Missed, rows: int) -> npt.NDArray[np.int64]:
    """[rows, columns]: the tokens that miss both one of the first columns and each."""
    counts = np.zeros((rows, missed.shape[1]), np.int64)
    for token in range(0, len(missed), _TOKENS):
        block = missed[token : token + _TOKENS].astype(np.float32)  # sums of so few ones are exact
        counts += (block[:, :rows].T @ block).astype(np.int64)
    return counts


class _Paths:
    """Paths through neurons, each neuron in one: at first, each a path of its own."""

    def __init__(self, neurons: int) -> None:
        self._beside: list[list[int]] = [[] for _ in range(neurons)]
        self._other = list(range(neurons))  # of a path's end: its other end

    def is_end(self, neuron: int) -> bool:
        return len(self._beside[neuron]) < 2

    def link(self, pairs: npt.NDArray[np.intp]) -> int:
        """Links each of `pairs` [pairs, 2] that are ends of two paths; returns how many."""
        linked = 0
        for one, other in pairs.tolist():
            if self.is_end(one) and self.is_end(other) and self._other[one] != other:
                self._beside[one].append(other)
                self._beside[other].append(one)
                far, farther = self._other[one], self._other[other]
                self._other[far], self._other[farther] = farther, far
                linked += 1
        return linked

    def walk(self, starts: Iterable[int]) -> Order:
        """All neurons, path by path: of `starts`, each neuron once, those that begin one."""
        order: list[int] = []
        seen = [False] * len(self._beside)
        for start in starts:
            if seen[start] or not self.is_end(start):
                continue
            step: int | None = start
            while step is not None:
                seen[step] = True
                order.append(step)
                step = next((n for n in self._beside[step] if not seen[n]), None)
        return np.array(order, np.int32)


def count_reads(missed: Missed, order: Order) -> int:
    """Reads that bring all of `missed`, bool [tokens, neurons], from bundles that lie in `order`:
    a run of neighbours is one, whatever its length."""
    placed = missed[:, order]
    return int(np.count_nonzero(placed[:, 0]) + np.count_nonzero(placed[:, 1:] & ~placed[:, :-1]))


def open_donor(path: Path, family: str, activation: Activation, geometry: Geometry) -> Store:
    """The store in `path`, whose predictors are to come along into one of that family, activation
    and geometry: it may have the bundles as floats where they are packed in that. `StoreError` if
    it has none that fit."""
    donor = Store.open(path)
    if not has_predictors(donor):
        raise StoreError(f"{path} has no predictors ({PREDICTORS}): run `inflash fit {path}`")
    if problem := predictor_problem(donor):
        raise StoreError(f"{problem}: run `inflash fit {path}` again")
    theirs = donor.geometry
    if theirs != geometry:
        theirs = dataclasses.replace(theirs, packed=geometry.packed)
    fits = (donor.family, donor.activation, theirs) == (family, activation, geometry)
    if not fits or donor.geometry.packed not in ("", geometry.packed):
        raise _other_model(donor, "another family, activation or shape")
    return donor


def carried(donor: Store, made: Store) -> dict[str, Tensor]:
    """The donor's predictors for the store `made`: in `b` and `bias` a predictor has a row per
    neuron, and those are put in its order; all else is as it was fitted.

    `StoreError` if the donor's weights are not, number by number, those of `made`.
    """
    if _residents(donor) != _residents(made):
        raise _other_model(donor, "other resident weights")
    tensors = read_header(donor.path / PREDICTORS)
    kinds: tuple[Kind, ...] = ("same", "ahead")
    for layer in range(made.geometry.layers):
        places = _places(donor.order(layer), made.order(layer), made.geometry.neurons)
        if not _same_neurons(donor, made, layer, places):
            raise _other_model(donor, f"other neurons in layer {layer}")
        for name in (tensor_name(layer, kind, f) for kind in kinds for f in ("b", "bias")):
            tensors[name] = reordered(tensors[name], places)
    return tensors


def _places(old: Order | None, new: Order | None, neurons: int) -> Order:
    """int32 [neurons]: at which place of `old` the neuron is that `new` has at each of its own."""
    natural = np.arange(neurons, dtype=np.int32)
    place_of = np.empty(neurons, np.int32)
    place_of[natural if old is None else old] = natural
    return place_of[natural if new is None else new]


def _residents(store: Store) -> dict[str, str]:
    """Digests of the resident weights but the FFN's biases, which lie in the neurons' order."""
    files = (e for e in store.manifest.files if e.path.startswith(RESIDENT_DIR))
    return {entry.path: entry.sha256 for entry in files if entry.path != BIASES}


def _same_neurons(donor: Store, made: Store, layer: int, places: Order) -> bool:
    """Whether neuron i of `made` is the donor's at `places[i]`, weights and biases."""
    theirs, ours = donor.biases(layer), made.biases(layer)
    placed = {part: b if part == TRANSPOSED else b[places] for part, b in theirs.items()}
    return (
        np.array_equal(made.checksums(layer), _checksums(donor, made.geometry, layer)[places])
        and placed.keys() == ours.keys()
        and all(np.array_equal(placed[part], ours[part]) for part in ours)
    )


def _checksums(donor: Store, geometry: Geometry, layer: int) -> Checksums:
    """Those of the donor's bundles, packed as `geometry` has them: packing is always the same."""
    if donor.geometry == geometry:
        return donor.checksums(layer)
    block = np.zeros((geometry.neurons, geometry.stride_bytes), np.uint8)
    for index, part in enumerate(geometry.parts):
        begin = index * geometry.row_bytes
        rows = packed(donor.rows(layer, part), geometry.packed)
        block[:, begin : begin + geometry.row_bytes] = rows
    return block_checksums(block)


def _other_model(donor: Store, what: str) -> StoreError:
    return StoreError(
        f"the predictors in {donor.path} are of another model, with {what}: name a store of this"
        " checkpoint, or leave --predictors out and run inflash fit afterwards"
    )
