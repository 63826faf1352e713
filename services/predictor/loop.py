"""The predictor's loop: Predict in, Fetch out. Owns predictor weights; reads no bundle."""

from __future__ import annotations

import time

import numpy as np

from common.lifecycle import Service
from common.limits import POLL_S, PREDICT_TOGETHER_MAX
from common.lowrank import EMBEDDING, Floats, Ids
from common.messages import Fetch, Predict
from common.plan import resolve_predictor
from common.store.geometry import Geometry
from common.store.store import Store
from services.predictor.predictors import PREDICTORS, Predictor


def serve(service: Service, store: Store) -> None:
    """Runs until asked to stop."""
    name = resolve_predictor(service.settings, store)
    loop = PredictorLoop(service, store.geometry, PREDICTORS[name](store))
    service.ready(store.id)
    loop.run()


class PredictorLoop:
    """The loop and its hands: two links and a clock."""

    def __init__(self, service: Service, geometry: Geometry, predictor: Predictor):
        self._service = service
        self._geometry = geometry
        self._predictor = predictor
        self._inbox = service.receive_from("predict")
        self._outbox = service.send_to("fetch")
        self._whole_layer = np.arange(geometry.neurons, dtype=np.int32)

    def run(self) -> None:
        while self._service.running():
            if self._inbox.socket.poll(int(POLL_S * 1000)):
                for message in self._inbox.receive():
                    self._answer(message)

    def _answer(self, message: Predict) -> None:
        """Names the layer's own neurons first: compute waits for them. Then the next layer's."""
        x = input_of(message, self._geometry)
        if x is None:
            self._service.count("bad_messages")
            return
        began_ns = ahead_ns = time.monotonic_ns()
        if message.layer != EMBEDDING:
            if slow_s := self._service.settings.slow.predictor_s:
                time.sleep(slow_s)
            ids = self._whole_layer if message.whole else self._predictor.name(message.layer, x)
            self._send(message, message.layer, False, ids)
            self._trace("predict", message, message.layer, began_ns, len(x), len(ids))
            ahead_ns = time.monotonic_ns()
        if message.ahead and message.whole and message.layer + 1 < self._geometry.layers:
            self._send(message, message.layer + 1, True, self._whole_layer)
        elif message.ahead and len(x) == len(message.requests):
            # Of a block of tokens only the first has a token before it whose layers are known.
            ahead = self._predictor.look_ahead(message.requests, message.layer, x)
            if ahead is not None:
                self._send(message, message.layer + 1, True, ahead)
                self._trace("ahead", message, message.layer + 1, ahead_ns, len(ahead))
        for request, newest in zip(message.requests, message.newest, strict=True):
            self._predictor.remember(request, message.layer, x[newest])
        self._service.count("predictions")
        self._service.count("predict_us", (time.monotonic_ns() - began_ns) // 1000)

    def _send(self, message: Predict, layer: int, prefetch: bool, ids: Ids) -> None:
        self._service.count("named_ahead" if prefetch else "named", len(ids))
        named_ns = time.monotonic_ns()
        self._outbox.send(
            Fetch(
                message.requests[0],
                message.step,
                layer,
                prefetch,
                named_ns,
                ids.tobytes(),
                message.trace,
            )
        )

    def _trace(self, name: str, of: Predict, layer: int, began_ns: int, *fields: int) -> None:
        if of.trace:
            now_ns = time.monotonic_ns()
            at = of.requests[0], of.step, layer
            self._service.spans.add(name, *at, began_ns, now_ns, *fields)


def input_of(message: Predict, geometry: Geometry) -> Floats | None:
    """The FFN input [rows, hidden] of a message, or None if it does not fit the model."""
    rows, rest = divmod(len(message.x), geometry.hidden * 4)
    if rest or not 1 <= rows <= PREDICT_TOGETHER_MAX:
        return None
    if not 1 <= len(message.requests) == len(message.newest):
        return None
    if not all(0 <= row < rows for row in message.newest):
        return None
    if not EMBEDDING <= message.layer < geometry.layers:
        return None
    return np.frombuffer(message.x, dtype="<f4").reshape(rows, geometry.hidden)
