"""The predictor's loop: Predict in, Fetch out. Owns predictor weights; reads no bundle."""

from __future__ import annotations

import time

import numpy as np

from common.lifecycle import Service
from common.limits import POLL_S, PREDICT_ROWS_MAX
from common.links import Link
from common.messages import Fetch, Predict
from common.store.geometry import Geometry
from common.store.store import Store
from services.predictor.predictors import PREDICTORS, Floats, Predictor


def serve(service: Service, store: Store) -> None:
    """Runs until asked to stop."""
    predictor = PREDICTORS[service.settings.predictor](store)
    whole_layer = np.arange(store.geometry.neurons, dtype=np.int32).tobytes()
    inbox = service.receive_from("predict")
    outbox = service.send_to("fetch")
    service.ready(store.id)
    while service.running():
        if inbox.socket.poll(int(POLL_S * 1000)):
            answer(service, store.geometry, predictor, whole_layer, inbox, outbox)


def answer(
    service: Service,
    geometry: Geometry,
    predictor: Predictor,
    whole_layer: bytes,
    inbox: Link,
    outbox: Link,
) -> None:
    """Answers the requests for prediction that are there; a senseless one is counted."""
    for message in inbox.receive():
        x = input_of(message, geometry)
        if x is None:
            service.count("bad_messages")
            continue
        began = time.perf_counter_ns()
        ids = predictor.name(message.layer, x).tobytes() if len(x) else whole_layer
        service.count("predictions")
        service.count("named", len(ids) // 4)
        service.count("predict_us", (time.perf_counter_ns() - began) // 1000)
        fetch = Fetch(message.request, message.step, message.layer, time.monotonic_ns(), ids)
        outbox.send(fetch)


def input_of(message: Predict, geometry: Geometry) -> Floats | None:
    """The FFN input [rows, hidden] of a message, or None if it does not fit the model."""
    rows = message.rows
    if not 0 <= message.layer < geometry.layers or not 0 <= rows <= PREDICT_ROWS_MAX:
        return None
    if len(message.x) != rows * geometry.hidden * 4:
        return None
    return np.frombuffer(message.x, dtype="<f4").reshape(rows, geometry.hidden)
