"""Pure: what a layer waited for, from the times that its parts carry.

A part's way has four stretches. What compute waited in a stretch is charged to its cause:

    asked ── predictor ── named ── queue ── taken ── flash ── landed ── queue ── received
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.messages import Resident
from common.spans import COUNTS

_SHARED = (
    "hits", "misses", "fired", "late_fired", "prefetched", "extra", "reads", "bytes_read",
    "wasted_bytes",
)  # fmt: skip


@dataclass(slots=True)
class LayerWaits:
    """One layer of one step: counts, and nanoseconds of waiting by cause."""

    rows: int
    asked_ns: int
    hits: int = 0
    misses: int = 0  # named neurons that were neither cached nor prefetched in time
    fired: int = 0  # neurons that were needed: of a decode step, those that fired for any row
    late_fired: int = 0  # of those, the misses: late neurons
    prefetched: int = 0  # hits that this step's look-ahead brought
    extra: int = 0  # neurons that came though the predictor did not name them
    parts: int = 0
    reads: int = 0
    bytes_read: int = 0
    wasted_bytes: int = 0  # prefetched and not needed
    read_ns: int = 0  # time in which the reader had reads in flight
    predictor_ns: int = 0
    queue_ns: int = 0
    flash_ns: int = 0
    compute_ns: int = 0  # in products: its own, and those of the attention before it

    @property
    def stall_ns(self) -> int:
        return self.predictor_ns + self.queue_ns + self.flash_ns

    def count(self, part: Resident) -> None:
        """Counts a part that has come."""
        neurons = len(part.ids) // 4
        if part.cached:
            self.hits += neurons - part.extra
            self.prefetched += part.prefetched
            self.extra += part.extra
        else:
            self.misses += neurons
        self.parts += 1
        self.reads += part.reads
        self.bytes_read += part.bytes_read
        self.wasted_bytes += part.wasted_bytes
        self.read_ns += part.read_ns

    def add(
        self, since_ns: int, until_ns: int, named_ns: int, taken_ns: int, landed_ns: int
    ) -> tuple[int, int, int]:
        """Charges the wait from `since_ns` to `until_ns`, which one part ended, to its causes:
        nanoseconds of predictor, queue and flash."""
        predictor = _common(since_ns, until_ns, self.asked_ns, named_ns)
        flash = _common(since_ns, until_ns, taken_ns, landed_ns)
        queue = max(until_ns - since_ns - predictor - flash, 0)
        self.predictor_ns += predictor
        self.flash_ns += flash
        self.queue_ns += queue
        return predictor, queue, flash

    def share(self, row: int, rows: int) -> LayerWaits:
        """Of a step that `rows` requests share, what is the share of one: of counts an equal part,
        and they add up; of times all, for each waited so long."""
        if rows == 1:
            return self
        parts = {name: getattr(self, name) for name in _SHARED}
        return replace(
            self, **{n: v * (row + 1) // rows - v * row // rows for n, v in parts.items()}
        )

    def counts(self) -> tuple[int, ...]:
        """The fields of the layer's span."""
        return tuple(getattr(self, name) for name in COUNTS)


def _common(a_from: int, a_to: int, b_from: int, b_to: int) -> int:
    """Length of what two intervals share."""
    return max(min(a_to, b_to) - max(a_from, b_from), 0)
