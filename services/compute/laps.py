"""Compute's time, cut into spans that lie end to end: whatever is between two laps is in one.

The sums are kept whether a request is traced or not; spans only if it is. The clock is the world's,
nothing else here is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from common.spans import NO_LAYER, Recorder, RunDelay


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


class Laps:
    """One request at a time: `begin`, then laps, each from where the last one ended."""

    def __init__(self, recorder: Recorder):
        self.product_time = ProductTime()
        self.trace = False
        self.at_ns = time.monotonic_ns()
        """Where the last lap ended."""
        self.step = 0
        self._recorder = recorder
        self._request = 0
        self._token_ns = self.at_ns
        self._delay = RunDelay(threading.get_native_id())

    def begin(self, request: int, trace: bool) -> None:
        """A request's time begins."""
        self._request, self.trace = request, trace
        self.at_ns = self._token_ns = time.monotonic_ns()
        self._delay.take()
        self.product_time.take()

    def lap(self, name: str, layer: int = NO_LAYER, *fields: int, at_ns: int = 0) -> int:
        """Ends a lap, a span of that name, now or at `at_ns`; its nanoseconds."""
        began_ns, self.at_ns = self.at_ns, at_ns or time.monotonic_ns()
        if self.trace:
            self._recorder.add(name, self._request, self.step, layer, began_ns, self.at_ns, *fields)
        return self.at_ns - began_ns

    def since(self, name: str, began_ns: int, layer: int, *fields: int) -> None:
        """A span around the laps since `began_ns`."""
        if self.trace:
            self._recorder.add(name, self._request, self.step, layer, began_ns, self.at_ns, *fields)

    def token(self, index: int) -> None:
        """A token was sent: the span around all laps since the one before."""
        if self.trace:
            self.since("token", self._token_ns, NO_LAYER, index, self._delay.take()[1])
        self._token_ns = self.at_ns
