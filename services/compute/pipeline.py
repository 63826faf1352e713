"""Compute's end of the chain Predict → Fetch → Resident → Release: asks for a layer, yields parts.

Owns the links to the predictor and the reader, and the mapping of the cache. A part may be read
from the moment it is yielded until the next one is asked for; then its slots are released.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.errors import LinkError
from common.firing import within
from common.lifecycle import Service
from common.limits import (
    PART_S,
    POLL_S,
    PREDICT_ROWS_MAX,
    PREDICT_TOGETHER_MAX,
    SLEPT_S,
    START_S,
)
from common.lowrank import EMBEDDING
from common.messages import Attached, Cache, Drop, Predict, Release, Resident, Unreadable
from common.segment import attach_segment, segment_path
from common.store.geometry import Geometry
from services.compute.ahead import LookAhead
from services.compute.failures import StepAbortedError, StepFailedError
from services.compute.laps import Laps
from services.compute.products import Products
from services.compute.rows import CacheRows
from services.compute.waits import LayerWaits

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Neurons that can be multiplied now: ids and slots, int64 [count] each; and whether compute
    had to wait for them."""

    ids: Indices
    slots: Indices
    late: bool


class Pipeline:
    """One step at a time: `begin`, then `parts` for each layer in order."""

    def __init__(self, service: Service, geometry: Geometry, slots: int, products: Products):
        """`slots`: of the whole cache, by the plan."""
        self._service = service
        self._geometry = geometry
        self._slots = slots
        self._products = products
        self._predict = service.send_to("predict")
        self._release = service.send_to("release")
        self._resident = service.receive_from("resident")
        self._requests: tuple[int, ...] = ()
        self._newest: tuple[int, ...] = ()  # rows of the step, each request's newest token
        self._whole = False  # whether it takes whole layers
        self._lookahead = LookAhead(service.settings.lookahead)
        self._step = 0
        self._is_block = False  # whether a request has more than one row in the step
        self._aborted: Callable[[], bool] = lambda: False
        self._layer_over: Callable[[int], None] = lambda _: None
        self.waits: list[LayerWaits] = []
        self.laps = Laps(service.spans)
        self.rows: CacheRows
        """The rows of the whole cache; set by `attach`."""

    def attach(self) -> None:
        """Waits for the reader's cache and maps it."""
        deadline = time.monotonic() + START_S
        while self._service.running():
            self._resident.socket.poll(int(POLL_S * 1000))
            for message in self._resident.receive():
                if isinstance(message, Cache) and self._fits(message):
                    self._map(message)
                    return
                self._service.count("bad_messages")
            if time.monotonic() > deadline:
                raise LinkError(
                    f"compute waited {START_S:.0f} s for reader to send Cache (limit START_S)"
                )

    def _fits(self, cache: Cache) -> bool:
        ours = str(segment_path(self._service.run_dir)), self._slots, self._geometry.stride_bytes
        return (cache.path, cache.slots, cache.stride_bytes) == ours

    def _map(self, cache: Cache) -> None:
        region = attach_segment(Path(cache.path), cache.slots * cache.stride_bytes)
        self.rows = CacheRows(region, self._geometry, self._products)
        self._release.send(Attached(os.getpid()))

    def begin(
        self,
        requests: tuple[int, ...],
        counts: Sequence[int],
        step: int,
        aborted: Callable[[], bool],
        layer_over: Callable[[int], None],
    ) -> None:
        """Starts a step with so many tokens of each request, rows one behind another. `aborted` is
        asked between parts whether to give it up, and `layer_over` is told of each layer that is
        over."""
        if not self._is_block:
            self._lookahead.learn(self.waits)
        self._requests, self._step, self._is_block = requests, step, max(counts) > 1
        self._newest = tuple(end - 1 for end in itertools.accumulate(counts))
        self._whole = max(counts) > PREDICT_ROWS_MAX or sum(counts) > PREDICT_TOGETHER_MAX
        self._aborted, self._layer_over = aborted, layer_over
        self.waits = []

    def drop(self) -> None:
        """Gives the step up: the reader forgets its fetches and takes its slots back."""
        self._release.send(Drop(self._step))

    def parts(self, layer: int, x: torch.Tensor) -> Iterator[Part]:
        """The neurons that `x` [rows, hidden] needs of a layer, part by part as they land.

        Raises StepFailedError, StepAbortedError, and LinkError if no part comes within PART_S.
        """
        product_ns = self.laps.product_time.take()
        self.laps.lap("attention", layer, product_ns)
        waits = LayerWaits(len(x), self.laps.at_ns, compute_ns=product_ns)
        self.waits.append(waits)
        self._ask(layer, x)
        self.laps.lap("ask", layer)
        while True:
            resident = self._next(layer, waits)
            waits.count(resident)
            if neurons := len(resident.ids) // 4:
                yield Part(_indices(resident.ids), _indices(resident.slots), not resident.cached)
                waits.compute_ns += self.laps.lap("ffn", layer, resident.part, neurons)
            self._release.send(Release(self._step, layer, resident.part))
            self.laps.lap("release", layer, resident.part)
            if self._is_block and self._aborted():  # it takes seconds
                raise StepAbortedError
            if resident.left == 0:
                self.laps.layer(layer, waits)
                self._layer_over(layer)
                return

    def fired(self, part: Part, count: int) -> None:
        """So many neurons of a part that was yielded did fire."""
        self.waits[-1].fired += count
        self.waits[-1].late_fired += count if part.late else 0

    def embedded(self, x: torch.Tensor) -> None:
        """Tells what enters layer 0, `x` [rows, hidden]: layer 0 is looked ahead from it."""
        self.laps.lap("embed", EMBEDDING, self.laps.product_time.take())
        self._ask(EMBEDDING, x)
        self.laps.lap("ask", EMBEDDING)

    def _ask(self, layer: int, x: torch.Tensor) -> None:
        newest, whole, trace = self._newest, self._whole, self.laps.trace
        if whole:
            x, newest = x[list(newest)], tuple(range(len(newest)))
        ahead = self._lookahead.pays(whole)
        frame = x.float().contiguous().numpy().tobytes()
        self._predict.send(
            Predict(self._requests, newest, self._step, layer, whole, ahead, frame, trace)
        )

    def _next(self, layer: int, waits: LayerWaits) -> Resident:
        since_ns, looked_ns = self.laps.at_ns, time.monotonic_ns()
        deadline_ns = looked_ns + int(PART_S * 1e9)
        while True:
            for message in self._resident.receive():
                if self._is_ours(message, layer):
                    if isinstance(message, Unreadable):
                        raise StepFailedError("reader", message.reason)
                    stamps = message.named_ns, message.taken_ns, message.landed_ns
                    came_ns = time.monotonic_ns()
                    causes = waits.add(since_ns, came_ns, *stamps)
                    self.laps.lap("wait", layer, message.part, *causes, at_ns=came_ns)
                    return message
            if self._aborted() or not self._service.running():
                raise StepAbortedError
            now_ns = time.monotonic_ns()
            if now_ns - looked_ns > SLEPT_S * 1e9:  # suspended: the others were, too
                deadline_ns += now_ns - looked_ns
            looked_ns = now_ns
            if now_ns > deadline_ns:
                raise LinkError(
                    f"compute waited {PART_S:.1f} s for part {waits.parts} of layer {layer},"
                    f" step {self._step}, from predictor and reader (limit PART_S)"
                )
            self._resident.socket.poll(int(POLL_S * 1000))

    def _is_ours(self, message: Cache | Resident | Unreadable, layer: int) -> bool:
        """Whether a message is of this layer of this step, and sound; else it is put away."""
        if isinstance(message, Cache) or (message.step, message.layer) != (self._step, layer):
            self._service.count("stale_messages")
            if isinstance(message, Resident):  # a step that was dropped: its slots are not needed
                self._release.send(Release(message.step, message.layer, message.part))
            return False
        if isinstance(message, Unreadable) or self._is_sound(message):
            return True
        self._service.count("bad_messages")
        return False

    def _is_sound(self, message: Resident) -> bool:
        ids, slots = message.ids, message.slots
        if len(ids) != len(slots) or len(ids) % 4 or message.left < -1 or message.part < 0:
            return False
        if not 0 <= message.prefetched + message.extra <= 2 * self._geometry.neurons:
            return False
        return _within(ids, self._geometry.neurons) and _within(slots, self._slots)


def _within(raw: bytes | memoryview, bound: int) -> bool:
    return bool(within(np.frombuffer(raw, dtype="<i4"), bound))


def _indices(raw: bytes | memoryview) -> Indices:
    return np.frombuffer(raw, dtype="<i4").astype(np.int64)
