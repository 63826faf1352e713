"""The index of one layer's slots: which neuron lies where, and who holds it.

    free ──claim──▶ loading ──land──▶ resident ──evicted──▶ free
                       └─────fail───────────────────────────▶

A slot that is loading is pinned by the group that loads it. Owns no bytes and makes no reads:
it only keeps the books. Slots here count from 0 within the layer; ids and slots in one call
never repeat.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.reader.evict import Slots, evict

Ids = npt.NDArray[np.int32]

NONE = -1


class LayerCache:
    """Slots of one layer. Arrays are readable by all and written only here."""

    def __init__(self, neurons: int, slots: int, window: int | None) -> None:
        """`window`: tokens for which an unused neuron stays, None for as long as room lasts."""
        self.slot_of = np.full(neurons, NONE, np.int32)
        self.neuron_of = np.full(slots, NONE, np.int32)
        self.loading = np.zeros(slots, np.bool_)
        self.pins = np.zeros(slots, np.int32)
        self.last_used = np.zeros(slots, np.int64)
        self.resident = 0  # slots that are
        self.evictions = 0  # so far
        self._window = window

    @property
    def slots(self) -> int:
        return len(self.neuron_of)

    def find(self, ids: Ids) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Two masks over `ids`: what is resident, and what is absent. The rest is loading."""
        slots = self.slot_of[ids]
        absent = slots == NONE
        # An absent neuron looks at the last slot (index -1): its answer is masked out.
        return ~absent & ~self.loading[slots], absent

    def room(self) -> int:
        """Slots that a claim could have now: free ones and those that nobody holds."""
        return self.slots - int(np.count_nonzero(self.pins))

    def expire(self, now: int) -> None:
        """Gives up what left the window: at the start of a token it is no hit any more."""
        if self._window is not None:
            self._give_up(now, 0)

    def pin(self, ids: Ids, now: int) -> Slots:
        """Holds the slots of resident `ids` and marks them used; returns the slots."""
        slots = self.slot_of[ids]
        self.pins[slots] += 1
        self.last_used[slots] = now
        return slots

    def unpin(self, slots: Slots) -> None:
        self.pins[slots] -= 1

    def claim(self, ids: Ids, now: int) -> Slots:
        """Slots for absent `ids`, loading and pinned: free slots first, then evicted ones.

        At most `room()` ids. Returns int32 [ids], ascending, so that neighbours stay neighbours.
        """
        free = np.flatnonzero(self.neuron_of == NONE)
        if len(free) < len(ids):
            self._give_up(now, len(ids) - len(free))
            free = np.flatnonzero(self.neuron_of == NONE)
        slots = free[: len(ids)].astype(np.int32)
        self.slot_of[ids] = slots
        self.neuron_of[slots] = ids
        self.loading[slots] = True
        self.pins[slots] = 1
        self.last_used[slots] = now
        return slots

    def land(self, slots: Slots) -> None:
        """Loading slots hold their neuron now; their pins stay."""
        self.loading[slots] = False
        self.resident += len(slots)

    def fail(self, slots: Slots) -> None:
        """Loading slots hold nothing of worth; they are free."""
        self.slot_of[self.neuron_of[slots]] = NONE
        self.neuron_of[slots] = NONE
        self.loading[slots] = False
        self.pins[slots] = 0

    def _give_up(self, now: int, want: int) -> None:
        held = (self.pins > 0) | (self.neuron_of == NONE)
        slots = evict(self.last_used, held, now, self._window, want)
        self.slot_of[self.neuron_of[slots]] = NONE
        self.neuron_of[slots] = NONE
        self.resident -= len(slots)
        self.evictions += len(slots)
