"""Starts the processes of the Procfile as one server, watches them, and ends them all.

`with Server(options) as server:` is a ready server; leaving it leaves no process, socket or
segment. `inflash serve`, `inflash compare`, the demo and the tests start servers through it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from honcho.environ import parse_procfile

from common.claim import claim, claim_path
from common.config import read_settings
from common.errors import UserError
from common.limits import HEALTH_EVERY_S, HEALTH_LOST_S, POLL_S, START_S, STOP_S
from common.links import LINKS
from common.messages import SERVICES
from common.segment import segment_path
from inflash import Client
from inflash._errors import InflashError
from inflash._rundir import CLIENT_LINK, endpoint, socket_path

CHECKOUT = Path(__file__).resolve().parent.parent


class Server:
    """The services as child processes. `options` are settings by name, as in common/config.py."""

    def __init__(self, options: Mapping[str, str], *, quiet: bool = False):
        overrides = {f"INFLASH_{key.upper()}": value for key, value in options.items()}
        inherited = {k: v for k, v in os.environ.items() if k not in overrides}
        self.environ = inherited | overrides
        self.settings = read_settings(self.environ)
        self.run_dir = self.settings.run_dir
        self.environ["INFLASH_RUN_DIR"] = str(self.run_dir)
        self.environ["INFLASH_PARENT"] = str(os.getpid())
        self._output = subprocess.DEVNULL if quiet else None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None
        self._claim = contextlib.ExitStack()
        self._next_look = 0.0
        self._unanswered = 0

    def start(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Starts the services and returns when all are ready; `UserError` if one ends first, or
        START_S passes. `cancelled` is asked between looks."""
        for link in (*LINKS, CLIENT_LINK):
            endpoint(self.run_dir, link)  # raises for a path that no socket can have
        self._claim.enter_context(claim(self.run_dir, "server"))
        for name in SERVICES:
            with claim(self.run_dir, name):  # raises for services that another launcher started
                pass
        self.clear()
        procfile = parse_procfile((CHECKOUT / "Procfile").read_text(encoding="utf-8"))
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.environ.get('PATH', '')}"
        for name, command in procfile.processes.items():
            self.processes[name] = subprocess.Popen(
                command.split(),
                cwd=CHECKOUT,
                env=self.environ | {"PATH": path},
                stdout=self._output,
                start_new_session=True,  # the terminal's Ctrl-C is for us; we end them in order
            )
        self._await_ready(cancelled)

    def _await_ready(self, cancelled: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if ended := self.ended():
                name, reason = ended
                log = self.run_dir / "log" / f"{name}.jsonl"
                raise UserError(f"{name} {reason} before the server was ready; its log: {log}")
            if cancelled():
                return
            if self.state() == "ready":
                return
            time.sleep(POLL_S)
        raise UserError(f"the services were not ready within {START_S:.0f} s (limit START_S)")

    def state(self, timeout_s: float = 1.0) -> str:
        """The server's own word on its state: starting, ready or failing; "" if it has none."""
        try:
            if self._client is None:
                self._client = Client(self.run_dir)
            self._client.timeout = timeout_s
            return str(self._client.status()["state"])
        except InflashError:
            return ""

    def lost(self) -> tuple[str, str] | None:
        """The service that a ready server has lost, and why; None while all is well. The gateway
        watches the others; that it answers itself is watched here."""
        if ended := self.ended():
            return ended
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + HEALTH_EVERY_S
        self._unanswered = 0 if self.state(HEALTH_LOST_S) else self._unanswered + 1
        # Once may be our own sleep: a machine that was suspended, a container that was frozen.
        if self._unanswered < 2:
            return None
        return self.ended() or ("gateway", f"did not answer within {2 * HEALTH_LOST_S} s")

    def ended(self) -> tuple[str, str] | None:
        """The first service that has ended by now, and how; None while all run."""
        # The gateway ends when it has lost another service: that one is the reason.
        for name in sorted(self.processes, key=lambda name: name == "gateway"):
            status = self.processes[name].poll()
            if status is None:
                continue
            if status < 0:
                return name, f"was killed by {signal.Signals(-status).name}"
            return name, f"ended with status {status}"
        return None

    def stop(self) -> None:
        """Ends every service: SIGTERM, then SIGKILL after STOP_S; then clears what the killed
        left."""
        if self._client is not None:
            self._client.close()
            self._client = None
        with self._claim:
            self._stop_all()

    def _stop_all(self) -> None:
        if not self.processes:
            return
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in self.processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.clear()

    def clear(self) -> None:
        """Removes sockets, claims and the segment of this server; call it when none of it runs."""
        for link in (*LINKS, CLIENT_LINK):
            socket_path(self.run_dir, link).unlink(missing_ok=True)
        for name in SERVICES:
            claim_path(self.run_dir, name).unlink(missing_ok=True)
        segment_path(self.run_dir).unlink(missing_ok=True)

    def let_gateway_say_why(self) -> None:
        """After a service ended: the gateway fails the requests in flight, naming it, and ends."""
        gateway = self.processes["gateway"]
        try:
            gateway.wait(HEALTH_LOST_S + 2 * POLL_S)
        except subprocess.TimeoutExpired:
            return

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
