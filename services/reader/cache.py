"""The index of the cache: which neuron lies in which slot, and who holds it.

    free ──claim──▶ loading ──land──▶ resident ──evicted──▶ free ──withdraw──▶ withdrawn
                       └─────fail───────────────────────────▶ ◀────restore─────────┘

A pool is slots that compete: those of one layer, or those of all layers (setting `slots`). A slot
that is loading is pinned by the group that loads it, and a withdrawn one is out of use: its bytes
belong to the system. Where layers compete, a slot that was evicted for one that streams is passing:
free again with its last pin, for what streams next. Else a prompt, which asks for each layer whole,
drives out what the layers to come would find.

Owns no bytes and makes no reads: it only keeps the books. Callers name a neuron by layer and id and
a slot by its number in the whole cache; ids and slots in one call never repeat. They are int64,
by which numpy looks up in half the time that int32 takes; what is looked up may be int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.policy import NEVER_USED, Keys, Policy, Slots, evict

Ids = npt.NDArray[np.int64]

NONE = -1

# Who leaves is chosen among so many slots for each that has to go; where many have to, as for a
# prompt, among fewer. Among all of them it took 3 ms with 131,072 slots, and misses became no fewer
# (docs/measurements.md).
EVICT_AMONG, EVICT_AMONG_MANY = 32, 4
LINE_SLOTS = 16  # whose int32 are in a line of memory
EVICT_LOOK = 16_384  # slots: more than that are not looked at for EVICT_AMONG's sake


class Pool:
    """Slots that compete. Arrays are readable by all and written only here; they count neurons
    from the first layer's first, and slots from the pool's first."""

    def __init__(self, layers: range, neurons: int, slots: range, policy: Policy) -> None:
        """Slots `slots` of the whole cache for `layers`, each of so many `neurons`."""
        self.layers = layers
        self.slot_of = np.full(len(layers) * neurons, NONE, np.int32)
        # Of neurons, not of slots: one that comes back has the use count that it left with.
        self.keys: Keys = np.full(len(layers) * neurons, NEVER_USED)
        self.neuron_of = np.full(len(slots), NONE, np.int32)
        self.loading = np.zeros(len(slots), np.bool_)
        self.withdrawn = np.zeros(len(slots), np.bool_)
        self.passing = np.zeros(len(slots), np.bool_)
        self.pins = np.zeros(len(slots), np.int32)
        self.pinned = 0  # slots with a pin or more
        self.usable = len(slots)  # slots that are not withdrawn
        self.resident = 0  # slots that are
        self.evictions = 0  # so far
        self._neurons = neurons
        self._first_slot = slots.start
        self._policy = policy
        self._expired = 0  # the token in which `expire` last looked
        self._shuffled = _shuffled(len(slots))
        self._hand = 0  # where in it the next eviction looks first
        # A stack, its top at `_free_count`; at first the lowest slots are on top.
        self._free = np.arange(len(slots), dtype=np.int32)[::-1].copy()
        self._free_count = len(slots)
        self._passed = 0  # of the free slots, those that were passing

    def __len__(self) -> int:
        return len(self.neuron_of)

    def find(self, layer: int, ids: Ids) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Two masks over `ids`: what is resident, and what is absent. The rest is loading."""
        slots = self._slots(layer, ids)
        absent = slots == NONE
        # An absent neuron looks at the last slot (index -1): its answer is masked out.
        return ~absent & ~self.loading[slots], absent

    def residents(self, layer: int) -> Ids:
        """The ids that are resident, ascending."""
        first = (layer - self.layers.start) * self._neurons
        slots = self.slot_of[first : first + self._neurons]
        return np.flatnonzero((slots != NONE) & ~self.loading[slots])

    def held(self, layer: int, ids: Ids) -> npt.NDArray[np.bool_]:
        """A mask over `ids`, none of them absent: whose slots are pinned."""
        return self.pins[self._slots(layer, ids)] > 0

    def most_used(self, layer: int, ids: Ids, count: int) -> Ids:
        """Those `count` of `ids` that the policy would keep longest, ascending."""
        surplus = len(ids) - count
        if surplus <= 0:
            return ids
        keys = self.keys[self._numbers(layer, ids)]
        return np.delete(ids, np.argpartition(keys, surplus - 1)[:surplus])

    def room(self) -> int:
        """Slots that a claim could have now: free ones and those that nobody holds."""
        return self.usable - self.pinned

    def expire(self, now: int) -> None:
        """Gives up what left the window: at the start of a token it is no hit any more."""
        if now != self._expired:
            self._expired = now
            if (floor := self._policy.floor(now)) != NEVER_USED:
                self._give_up_of(self._shuffled, floor, 0)

    def use(self, layer: int, ids: Ids, now: int) -> None:
        """Marks `ids` used in token `now`, wherever they are."""
        numbers = self._numbers(layer, ids)
        self.keys[numbers] = self._policy.used(self.keys[numbers], now)

    def pin(self, layer: int, ids: Ids) -> Slots:
        """Holds the slots of resident `ids`; returns the slots."""
        slots = self._slots(layer, ids)
        pins = self.pins[slots] + 1
        self.pins[slots] = pins
        self.pinned += int(np.count_nonzero(pins == 1))
        return slots + self._first_slot

    def unpin(self, slots: Slots) -> None:
        """Gives up a hold; a passing slot that nobody else holds is free."""
        slots = slots - self._first_slot
        pins = self.pins[slots] - 1
        self.pins[slots] = pins
        self.pinned -= int(np.count_nonzero(pins == 0))
        over = slots[pins == 0]
        over = over[self.passing[over]]
        if len(over):
            self.resident -= len(over)
            self._free_up(over)

    def claim(self, layer: int, ids: Ids, streams: bool = False) -> Slots:
        """Slots for absent `ids`, loading and pinned: free slots first, then evicted ones. If the
        layer `streams`, and others have slots here, too, evicted ones are passing.

        At most `room()` ids. Returns int64 [ids], ascending.
        """
        evicted = max(len(ids) - self._free_count, 0)
        if evicted:
            self._give_up(evicted)
        again = passing = 0
        if streams and len(self.layers) > 1:
            again = min(self._passed, len(ids) - evicted)
            passing = again + evicted
        self._passed -= again
        slots = np.sort(self._pop_free(len(ids)))
        self.passing[slots[:passing]] = True
        numbers = self._numbers(layer, ids)
        self.slot_of[numbers] = slots
        self.neuron_of[slots] = numbers
        self.loading[slots] = True
        self.pins[slots] = 1
        self.pinned += len(slots)
        return slots + self._first_slot

    def land(self, slots: Slots) -> None:
        """Loading slots hold their neuron now; their pins stay."""
        self.loading[slots - self._first_slot] = False
        self.resident += len(slots)

    def fail(self, slots: Slots) -> None:
        """Loading slots hold nothing of worth; they are free."""
        slots = slots - self._first_slot
        self.loading[slots] = False
        self.pins[slots] = 0
        self.pinned -= len(slots)
        self._free_up(slots)

    def withdraw(self, count: int) -> Slots:
        """Takes up to `count` slots out of use, free ones first, and returns them.

        At most what nobody holds, and one slot stays in use.
        """
        count = max(0, min(count, self.usable - 1, self.room()))
        if count > self._free_count:
            self._give_up(count - self._free_count)
        slots = self._pop_free(count)
        self.withdrawn[slots] = True
        self.usable -= count
        return slots + self._first_slot

    def restore(self, count: int) -> Slots:
        """Puts up to `count` withdrawn slots into use again, and returns them."""
        slots = np.flatnonzero(self.withdrawn)[: max(0, count)]
        self.withdrawn[slots] = False
        self.usable += len(slots)
        self._push_free(slots)
        return slots + self._first_slot

    def _numbers(self, layer: int, ids: Ids) -> Ids:
        return ids + (layer - self.layers.start) * self._neurons

    def _slots(self, layer: int, ids: Ids) -> Slots:
        """Where they are, from the pool's first slot; NONE of absent ones."""
        return self.slot_of[self._numbers(layer, ids)].astype(np.int64)

    def _give_up(self, want: int) -> None:
        """Gives up so many slots, if nobody holds them; what left the window went before."""
        look = max(min(want * EVICT_AMONG, EVICT_LOOK), want * EVICT_AMONG_MANY)
        want -= self._give_up_of(self._next(look), NEVER_USED, want)
        if want > 0:
            self._give_up_of(self._shuffled, NEVER_USED, want)

    def _next(self, count: int) -> Slots:
        """So many slots, or all if there are fewer: other ones than the last time."""
        first, count = self._hand, min(count, len(self))
        end = first + count
        self._hand = end % len(self)
        if end <= len(self):
            return self._shuffled[first:end]
        return np.concatenate([self._shuffled[first:], self._shuffled[: end - len(self)]])

    def _give_up_of(self, some: Slots, floor: float, want: int) -> int:
        """Of some slots, as `evict` has it; how many."""
        neurons = self.neuron_of[some].astype(np.int64)
        held = (self.pins[some] > 0) | (neurons == NONE)
        slots = some[evict(self.keys[neurons], held, floor, want)]
        self._free_up(slots)
        self.resident -= len(slots)
        self.evictions += len(slots)
        return len(slots)

    def _free_up(self, slots: Slots) -> None:
        self.slot_of[self.neuron_of[slots].astype(np.int64)] = NONE
        self.neuron_of[slots] = NONE
        self._passed += int(np.count_nonzero(self.passing[slots]))
        self.passing[slots] = False
        self._push_free(slots)

    def _push_free(self, slots: Slots) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def _pop_free(self, count: int) -> Slots:
        self._free_count -= count
        self._passed = min(self._passed, self._free_count)
        return self._free[self._free_count : self._free_count + count].astype(np.int64)


def _shuffled(slots: int) -> Slots:
    """All slots in an order by chance, but that those whose numbers share a line of memory stay
    together, so that it is brought once for all of them."""
    lines = np.random.default_rng(0).permutation(-(-slots // LINE_SLOTS))
    order = (lines[:, None] * LINE_SLOTS + np.arange(LINE_SLOTS)).reshape(-1)
    return order[order < slots]


def among(ids: Ids, others: Ids, neurons: int) -> npt.NDArray[np.bool_]:
    """A mask over `ids`: which are in `others`. A table of a layer's `neurons` takes 5 µs for 400
    ids, where np.isin takes 30."""
    table = np.zeros(neurons, np.bool_)
    table[others] = True
    return table[ids]


def make_pools(neurons: int, slots: Sequence[int], policy: Policy, scope: str) -> list[Pool]:
    """The pool of each layer, `slots` per layer; with scope "global" it is one for all."""
    if scope == "global":
        shared = Pool(range(len(slots)), neurons, range(sum(slots)), policy)
        return [shared] * len(slots)
    pools, first = [], 0
    for layer, count in enumerate(slots):
        pools.append(Pool(range(layer, layer + 1), neurons, range(first, first + count), policy))
        first += count
    return pools


@dataclass(frozen=True)
class Resize:
    """Slots of the whole cache, int64, whose bytes change hands."""

    withdrawn: Slots  # out of use from now on: their bytes may be given back
    restored: Slots  # in use from now on: their bytes must be there before the next claim


def resize(pools: Sequence[Pool], slots: int, layer_slots_min: int) -> Resize:
    """Brings the slots in use toward `slots`, each pool's in proportion to its size.

    A layer keeps `layer_slots_min`, or what it has if that is less. What is held now cannot be
    withdrawn: ask again when it was released.
    """
    total = sum(map(len, pools))
    withdrawn: list[Slots] = []
    restored: list[Slots] = []
    for pool in pools:
        target = min(max(slots * len(pool) // total, layer_slots_min * len(pool.layers)), len(pool))
        withdrawn.append(pool.withdraw(pool.usable - target))
        restored.append(pool.restore(target - pool.usable))
    return Resize(np.concatenate(withdrawn), np.concatenate(restored))
