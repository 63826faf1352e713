"""The client's socket: how it is made, watched and found missing. Owns no protocol.

The heartbeats are ZeroMQ's own, answered by the gateway's I/O thread: they tell a dead or stopped
gateway from a busy one, in HEARTBEAT_MS + HEARTBEAT_LOST_MS at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from inflash._errors import ServerNotFound
from inflash._messages import CLIENT_MESSAGE_BYTES_MAX
from inflash._rundir import CLIENT_LINK, endpoint

HEARTBEAT_MS = 1000
HEARTBEAT_LOST_MS = 2000

GONE = "the connection ended: the gateway's process died or was stopped (or this one was)"

AnySocket = TypeVar("AnySocket", bound=zmq.Socket[Any])


def open_socket(context: zmq.Context[AnySocket], run_dir: Path) -> tuple[AnySocket, AnySocket]:
    """The socket to the gateway in `run_dir`, and the socket that tells when it is cut off.

    `ServerNotFound` at once if no gateway ever bound there. That it still lives is for a first
    status request to show.
    """
    address = endpoint(run_dir, CLIENT_LINK)
    if not Path(address.removeprefix("ipc://")).exists():
        raise ServerNotFound(not_found(run_dir))
    socket = context.socket(zmq.DEALER)
    # No high-water mark: a client that does not read for a while is not to lose its answers, and
    # what may wait is bounded by the server's queue. (With one, libzmq 4.3.5 aborts the process
    # when heartbeats meet a full pipe.)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, CLIENT_MESSAGE_BYTES_MAX)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_LOST_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_MS + HEARTBEAT_LOST_MS)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(address)
    return socket, monitor


def is_disconnect(frames: list[bytes]) -> bool:
    """Whether a message of the watching socket says that the gateway is gone."""
    return parse_monitor_message(frames)["event"] == zmq.EVENT_DISCONNECTED


def not_found(run_dir: Path) -> str:
    """What to tell a user whose server does not answer."""
    return (
        f"no server answers in {run_dir}; start one with `inflash serve STORE`, or name its"
        " directory with run_dir=, --run-dir or INFLASH_RUN_DIR"
    )


def no_status(limit_s: float) -> str:
    """What to tell a user whose server is connected and silent."""
    return (
        f"the client waited {limit_s:g} s for the gateway to answer a status request"
        " (setting: the client's timeout)"
    )
