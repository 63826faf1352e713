"""The clients' socket: a ROUTER that counts what is bad and says who is gone. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import zmq

from common.limits import (
    CLIENT_HEARTBEAT_S,
    CLIENT_LINGER_S,
    CLIENT_LOST_S,
    LINK_MESSAGES_MAX,
    RECEIVE_BATCH_MAX,
    WIRE_BYTES_MAX,
)
from inflash._messages import CLIENT_CODEC, CLIENT_MESSAGE_BYTES_MAX
from inflash._rundir import CLIENT_LINK, endpoint, socket_path
from inflash._wire import BadMessage


class Clients:
    """All clients' connections. A context manager; leaving it sends what is still to be sent.

    Its ZeroMQ context is its own, so that its end can be waited for.
    """

    def __init__(self, run_dir: Path):
        self._path = socket_path(run_dir, CLIENT_LINK)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error
        self.socket.setsockopt(zmq.MAXMSGSIZE, WIRE_BYTES_MAX)
        self.socket.set_hwm(LINK_MESSAGES_MAX)
        self.socket.setsockopt(zmq.LINGER, int(CLIENT_LINGER_S * 1000))
        silent_ms = int((CLIENT_LOST_S - CLIENT_HEARTBEAT_S) * 1000)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, int(CLIENT_HEARTBEAT_S * 1000))
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, silent_ms)
        self.socket.bind(endpoint(run_dir, CLIENT_LINK))

    def receive(self) -> Iterator[tuple[bytes, Any]]:
        """(client, message) of what is there now, at most RECEIVE_BATCH_MAX; a `BadMessage` in the
        place of a message that is none."""
        for _ in range(RECEIVE_BATCH_MAX):
            try:
                client, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if sum(map(len, frames)) > CLIENT_MESSAGE_BYTES_MAX:
                    raise BadMessage(f"over {CLIENT_MESSAGE_BYTES_MAX} bytes")
                yield client, CLIENT_CODEC.decode(frames)
            except BadMessage as bad:
                yield client, bad

    def send(self, client: bytes, message: Any) -> bool:
        """False if the client is gone, or has not read LINK_MESSAGES_MAX messages."""
        try:
            self.socket.send_multipart([client, *CLIENT_CODEC.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()
        self._path.unlink(missing_ok=True)  # ZeroMQ leaves it
