"""What all requests of a server came to: the figures of their answers, summed. Pure."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from inflash._messages import Stats

SECONDS = tuple(base * 10.0**power for power in range(-3, 2) for base in (1, 2, 5))
"""Bounds of the buckets of all histograms: 1 ms to 50 s."""


@dataclass
class Histogram:
    """How many values fell under each bound, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class Totals:
    """Sums over the requests that ended with figures."""

    requests: int = 0
    stats: dict[str, float] = field(
        default_factory=lambda: {f.name: 0 for f in dataclasses.fields(Stats)}
    )
    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    token: Histogram = field(default_factory=Histogram)
    """Between a token and the one before."""

    def add(self, stats: Stats) -> None:
        """A request has ended."""
        self.requests += 1
        for name in self.stats:
            self.stats[name] += getattr(stats, name)
        self.queue.add(stats.queue_s)
        if stats.new_tokens:
            self.first_token.add(stats.time_to_first_token_s)

    def report(self) -> dict[str, Any]:
        """The figures as `inflash status` has them: an answer's, for all answers together."""
        exact: dict[str, Any] = self.stats
        sums = Stats(**exact)
        # Of many answers each has a first token: the speed is that of the others.
        later = self.token.count
        return {
            "requests": self.requests,
            "prompt_tokens": sums.prompt_tokens,
            "reused_tokens": sums.reused_tokens,
            "new_tokens": sums.new_tokens,
            "tokens_per_s": later / sums.decode_s if sums.decode_s else 0.0,
            "bytes_read": sums.bytes_read,
            "hit_rate": sums.hit_rate,
            "late_share": sums.decode_late_share,
            "decode_s": {
                "all": sums.decode_s,
                "compute": sums.decode_compute_s,
                "predictor": sums.decode_predictor_stall_s,
                "queue": sums.decode_queue_stall_s,
                "flash": sums.decode_flash_stall_s,
                "others": sums.decode_others_s,
                "python": sums.decode_python_s,
            },
        }
