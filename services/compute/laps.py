"""Compute's time, cut into spans that lie end to end: whatever is between two laps is in one.

Several requests may run. A lap is of those whose step it is, and a span for each of them; what
passed for the others meanwhile is one span of theirs, `others`, when their turn comes again. So
each request's spans lie end to end.

The sums are kept whether a request is traced or not; spans only if it is. The clock is the world's,
nothing else here is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.spans import NO_LAYER, NO_STEP, Recorder, RunDelay
from services.compute.waits import LayerWaits


class ProductTime:
    """Time spent in products of matrices since the last `take`."""

    def __init__(self) -> None:
        self._ns = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time counted."""

        def run(*args: Any, **named: Any) -> Any:
            began_ns = time.monotonic_ns()
            result = call(*args, **named)
            self._ns += time.monotonic_ns() - began_ns
            return result

        return run

    def take(self) -> int:
        """Nanoseconds since the last take."""
        taken, self._ns = self._ns, 0
        return taken


@dataclass(slots=True)
class Track:
    """One request's time."""

    request: int
    trace: bool
    at_ns: int  # where its last span ended
    token_ns: int  # when its last token was sent, or it began
    delayed_ns: int  # of this thread, until then
    others_ns: int = 0  # that passed for others


class Laps:
    """`begin` for each request, `turn` says whose step comes, then laps, each from where the last
    one ended."""

    def __init__(self, recorder: Recorder):
        self.product_time = ProductTime()
        self.at_ns = time.monotonic_ns()
        """Where the last lap ended."""
        self._recorder = recorder
        self._step = NO_STEP
        self._tracks: dict[int, Track] = {}
        self._now: list[Track] = []
        self._delay = RunDelay(threading.get_native_id())
        self._delayed_ns = 0

    @property
    def trace(self) -> bool:
        """Whether any request of the step is traced."""
        return any(track.trace for track in self._now)

    def begin(self, request: int, trace: bool) -> None:
        """A request's time begins."""
        self.at_ns = time.monotonic_ns()
        self.product_time.take()
        self._tracks[request] = Track(request, trace, self.at_ns, self.at_ns, self._delayed())

    def end(self, request: int) -> int:
        """It is over; the nanoseconds of it that passed for others."""
        track = self._tracks.pop(request)
        self._now = [other for other in self._now if other is not track]
        return track.others_ns

    def turn(self, requests: Sequence[int], step: int) -> None:
        """What comes is of these requests."""
        self._step, self._now = step, [self._tracks[request] for request in requests]
        for track in self._now:
            if track.at_ns < self.at_ns:
                track.others_ns += self.at_ns - track.at_ns
                if track.trace:
                    at = track.request, NO_STEP, NO_LAYER
                    self._recorder.add("others", *at, track.at_ns, self.at_ns)
                track.at_ns = self.at_ns

    def others_ns(self, request: int) -> int:
        """Nanoseconds of a request that passed for others so far."""
        return self._tracks[request].others_ns

    def lap(self, name: str, layer: int = NO_LAYER, *fields: int, at_ns: int = 0) -> int:
        """Ends a lap, a span of that name, now or at `at_ns`; its nanoseconds."""
        began_ns, self.at_ns = self.at_ns, at_ns or time.monotonic_ns()
        self.since(name, began_ns, layer, *fields)
        for track in self._now:
            track.at_ns = self.at_ns
        return self.at_ns - began_ns

    def since(self, name: str, began_ns: int, layer: int, *fields: int) -> None:
        """A span around the laps since `began_ns`."""
        for track in self._now:
            if track.trace:
                at = track.request, self._step, layer
                self._recorder.add(name, *at, began_ns, self.at_ns, *fields)

    def layer(self, layer: int, waits: LayerWaits) -> None:
        """The span around a layer's FFN. Each request has its share of the counts."""
        for row, track in enumerate(self._now):
            if track.trace:
                at, counts = (track.request, self._step, layer), waits.share(row, len(self._now))
                self._recorder.add("layer", *at, waits.asked_ns, self.at_ns, *counts.counts())

    def token(self, request: int, index: int) -> None:
        """A token was sent: the span around all laps since the one before."""
        track, delayed_ns = self._tracks[request], self._delayed()
        if track.trace:
            at = request, self._step, NO_LAYER
            late_ns = delayed_ns - track.delayed_ns
            self._recorder.add("token", *at, track.token_ns, self.at_ns, index, late_ns)
        track.token_ns, track.delayed_ns = self.at_ns, delayed_ns

    def _delayed(self) -> int:
        """How long this thread was ready and had no core so far."""
        self._delayed_ns += self._delay.take()[1]
        return self._delayed_ns
