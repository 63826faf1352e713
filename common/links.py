"""The table of links between services, and the one class that sends and receives on them.

Every link but the clients' is PUSH → PULL over an ipc socket in the run directory, named after the
link. The receiver binds. A bad message is counted, dropped, and never ends a service.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from common import messages
from common.errors import LinkError
from common.limits import (
    LINK_MESSAGES_MAX,
    MESSAGE_BYTES_MAX,
    RECEIVE_BATCH_MAX,
    SEND_S,
    WIRE_BYTES_MAX,
)
from inflash._rundir import endpoint, socket_path
from inflash._wire import BadMessage, Codec


@dataclass(frozen=True)
class Spec:
    """One row of the table: who pushes, who pulls (and binds), and what may be said."""

    name: str
    sender: str
    receiver: str
    codec: Codec


LINKS = {
    spec.name: spec
    for spec in (
        Spec("health", "all", "gateway", messages.HEALTH_CODEC),
        Spec("control", "gateway", "compute", messages.CONTROL_CODEC),
        Spec("answers", "compute", "gateway", messages.ANSWER_CODEC),
        Spec("predict", "compute", "predictor", messages.PREDICT_CODEC),
        Spec("fetch", "predictor", "reader", messages.FETCH_CODEC),
        Spec("resident", "reader", "compute", messages.RESIDENT_CODEC),
        Spec("release", "compute", "reader", messages.RELEASE_CODEC),
    )
}


class Link:
    """One end of a link. The receiving end binds, the sending end connects.

    Not for two threads. Close it, or use it as a context manager.
    """

    def __init__(self, context: zmq.Context[Any], run_dir: Path, name: str, *, receive: bool):
        self.spec = LINKS[name]
        self.dropped = 0
        self.socket = context.socket(zmq.PULL if receive else zmq.PUSH)
        self.socket.setsockopt(zmq.MAXMSGSIZE, WIRE_BYTES_MAX)
        self.socket.set_hwm(LINK_MESSAGES_MAX)
        self.socket.setsockopt(zmq.LINGER, 0)
        self._bound = socket_path(run_dir, name) if receive else None
        if receive:
            self.socket.bind(endpoint(run_dir, name))
        else:
            self.socket.connect(endpoint(run_dir, name))

    def send(self, message: Any, timeout_s: float = SEND_S) -> None:
        """Sends, waiting at most `timeout_s` for room; `LinkError` says who did not take it."""
        frames = self.spec.codec.encode(message)
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            if not self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
                raise LinkError(
                    f"{self.spec.sender} waited {timeout_s:.1f} s for {self.spec.receiver} to take"
                    f" {type(message).__name__} on link {self.spec.name} (limit SEND_S)"
                ) from None
            self.socket.send_multipart(frames, zmq.NOBLOCK)

    def receive(self) -> Iterator[Any]:
        """The messages that are there now, without waiting, at most RECEIVE_BATCH_MAX of them."""
        for _ in range(RECEIVE_BATCH_MAX):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if sum(map(len, frames)) > MESSAGE_BYTES_MAX:
                    raise BadMessage(f"over {MESSAGE_BYTES_MAX} bytes")
                yield self.spec.codec.decode(frames)
            except BadMessage:
                self.dropped += 1

    def close(self) -> None:
        self.socket.close()
        if self._bound is not None:  # ZeroMQ does it too, but later than a process may live
            self._bound.unlink(missing_ok=True)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
