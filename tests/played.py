"""A gateway process whose peers the test plays: their claims, heartbeats and links, for real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import zmq

import inflash
from common import messages
from common.launch import CHECKOUT
from common.limits import HEALTH_EVERY_S
from common.links import LINKS, Link
from common.store.store import Store
from inflash import _messages as wire
from inflash._rundir import CLIENT_LINK
from inflash._wire import VERSION

PLAYED = ("compute", "predictor", "reader")
STATS = wire.Stats(**dict.fromkeys(wire.Stats.__annotations__, 7))
PATIENCE_S = 10.0

Kind = TypeVar("Kind")


class Peers:
    """The other services: their claims, heartbeats, and compute's ends of its two links."""

    def __init__(self, run_dir: Path, store_id: str):
        self.run_dir = run_dir
        self._store_id = store_id
        self.pids = dict.fromkeys(PLAYED, os.getpid())
        self.silent: set[str] = set()
        self._context = zmq.Context()
        self._over = threading.Event()
        self.control = Link(self._context, run_dir, "control", receive=True)
        self.answers = Link(self._context, run_dir, "answers", receive=False)
        self._inbox: list[Any] = []
        self._heart = threading.Thread(target=self._beat)

    def start(self) -> None:
        for name, pid in self.pids.items():
            (self.run_dir / f"{name}.pid").write_text(f"{pid}\n")
        self._heart.start()

    def _beat(self) -> None:
        with Link(self._context, self.run_dir, "health", receive=False) as link:
            for name, pid in self.pids.items():
                link.send(messages.Ready(name, pid, VERSION, self._store_id))
            for number in range(1_000_000):
                for name in set(PLAYED) - self.silent:
                    link.send(messages.Health(name, self.pids[name], 1.0, number, {}))
                if self._over.wait(HEALTH_EVERY_S):
                    return

    def fault(self, name: str, reason: str) -> None:
        with Link(self._context, self.run_dir, "health", receive=False) as link:
            link.send(messages.Fault(name, self.pids[name], reason))
            time.sleep(0.3)

    def expect(self, kind: type[Kind]) -> Kind:
        """The next message to compute, which must be of this kind."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._inbox:
            assert time.monotonic() < deadline, f"no {kind.__name__} came"
            self.control.socket.poll(100)
            self._inbox += self.control.receive()
        message = self._inbox.pop(0)
        assert isinstance(message, kind), message
        return message

    def nothing_more(self, seconds: float = 0.5) -> None:
        assert not self._inbox
        assert not self.control.socket.poll(int(seconds * 1000))

    def token(self, request: int, token_id: int = 5, logits: bytes = b"") -> None:
        self.answers.send(messages.Token(request, 1, token_id, -0.5, logits))

    def done(self, request: int, reason: str = "length", error: str = "") -> None:
        service = "reader" if error else ""
        self.answers.send(messages.Done(request, reason, service, error, STATS))

    def close(self) -> None:
        self._over.set()
        if self._heart.ident:
            self._heart.join()
        self.control.close()
        self.answers.close()
        self._context.term()
        for name in PLAYED:
            (self.run_dir / f"{name}.pid").unlink(missing_ok=True)
        (self.run_dir / "control.ipc").unlink(missing_ok=True)


class Served:
    """A gateway process with its peers."""

    def __init__(self, run_dir: Path, store: Store):
        self.run_dir = run_dir
        self.peers = Peers(run_dir, store.id)
        environ = {"INFLASH_STORE": str(store.path), "INFLASH_RUN_DIR": str(run_dir)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"],
            cwd=CHECKOUT,
            env=os.environ | environ | {"INFLASH_CONTEXT": "64", "INFLASH_PREDICTOR": "all"},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while not (run_dir / f"{CLIENT_LINK}.ipc").exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def client(self, timeout: float = 60) -> inflash.Client:
        return inflash.Client(self.run_dir, timeout)

    def until(self, state: str) -> None:
        with self.client() as client:
            deadline = time.monotonic() + PATIENCE_S
            while client.status()["state"] != state:
                assert time.monotonic() < deadline, client.status()
                time.sleep(0.05)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE_S)
        self.peers.close()
        if self.process.returncode < 0:
            for link in (CLIENT_LINK, *LINKS):
                (self.run_dir / f"{link}.ipc").unlink(missing_ok=True)
            (self.run_dir / "gateway.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def serving_played(run_dir: Path, store: Store) -> Iterator[Served]:
    """A gateway whose peers have not said Ready; `peers.start()` has them say it."""
    served = Served(run_dir, store)
    try:
        yield served
    finally:
        served.close()
