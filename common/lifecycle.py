"""From launch to exit of a service: claim, Ready, heartbeat, signals, Fault, exit status.

    0   asked to stop (SIGTERM, SIGINT)
    1   a fault: logged once, with its traceback if it is a bug, and told to the gateway
    2   a bad setting

A service is a function of a `Service`: it makes its links, says `ready`, and turns its loop while
`service.running()`. What it raises ends the process; nothing is logged and carried on from.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import zmq

from common.apart import Apart
from common.claim import claim
from common.config import Settings, read_settings
from common.errors import LinkError, SettingError, UserError
from common.limits import HEALTH_EVERY_S, SEND_S
from common.links import Link
from common.log import LogFile, open_log
from common.messages import Fault, Health, Ready
from common.pagecache import forget_imports
from common.spans import NO_LAYER, NO_REQUEST, NO_STEP, Recorder, RunDelay, SpanFile
from common.store.store import Store
from inflash._errors import InflashError
from inflash._wire import VERSION


class Service:
    """What a service's loop has of the world around it. Made by `run`."""

    def __init__(self, name: str, settings: Settings, context: zmq.Context[Any]):
        self.name = name
        self.settings = settings
        self.run_dir = settings.run_dir
        self.context = context
        self._log_file = LogFile(settings.run_dir, name)
        self.log = open_log(self._log_file, name, settings.log_level)
        self.apart = Apart(settings.apart)
        self.counters: dict[str, int] = {}
        self._links: list[Link] = []
        self._beat = 0
        self._stopping = False  # no Event: setting one takes a lock, and signals may nest
        self._outgoing: queue.SimpleQueue[Ready | Fault | Health | None] = queue.SimpleQueue()
        self._heart = threading.Thread(target=self._send_health, name="heart", daemon=True)
        self._started = time.monotonic()
        self.spans = Recorder()
        self._span_file = SpanFile(settings.run_dir, name)
        self._delay = RunDelay(threading.get_native_id())
        self._beaten_ns = time.monotonic_ns()

    def receive_from(self, link: str) -> Link:
        """The receiving, binding end of a link; closed when the service ends."""
        return self._link(link, receive=True)

    def send_to(self, link: str) -> Link:
        """The sending, connecting end of a link; closed when the service ends."""
        return self._link(link, receive=False)

    def _link(self, name: str, *, receive: bool) -> Link:
        link = Link(self.context, self.run_dir, name, receive=receive)
        self._links.append(link)
        return link

    def ready(self, store_id: str) -> None:
        """Says Ready to the gateway: every receiving link is bound, the store is open."""
        forget_imports()
        self.log.info("ready", pid=os.getpid(), store_id=store_id)
        self._outgoing.put(Ready(self.name, os.getpid(), VERSION, store_id))

    def running(self) -> bool:
        """True until a signal asks to stop. Called once in every turn of the loop: it is the beat
        that the gateway watches."""
        self._beat += 1
        return not self._stopping

    def stop(self, *_: object) -> None:
        """The signal handler: only sets the flag."""
        self._stopping = True

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter of `inflash status`."""
        self.counters[name] = self.counters.get(name, 0) + by

    def all_counters(self) -> dict[str, int]:
        dropped = sum(link.dropped for link in self._links)
        bad = self.counters.get("bad_messages", 0) + dropped
        return self.counters | {"bad_messages": bad, "spans_lost": self.spans.lost}

    def _write_spans(self) -> None:
        if self.settings.trace == "on":
            since_ns, self._beaten_ns = self._beaten_ns, time.monotonic_ns()
            at = NO_REQUEST, NO_STEP, NO_LAYER, since_ns, self._beaten_ns
            self.spans.add("beat", *at, *self._delay.take())
        self._span_file.append(self.spans.take())

    def health(self) -> Health:
        return Health(
            self.name,
            os.getpid(),
            round(time.monotonic() - self._started, 3),
            self._beat,
            self.all_counters(),
        )

    def _send_health(self) -> None:
        """The heartbeat: a thread, so that a long multiply is no silence. It owns its link."""
        with Link(self.context, self.run_dir, "health", receive=False) as link:
            while True:
                try:
                    message = self._outgoing.get(timeout=HEALTH_EVERY_S)
                except queue.Empty:
                    message = self.health()
                if message is None:
                    return
                self._write_spans()
                if self.settings.parent not in (None, os.getppid()):
                    self.stop()  # whoever started us was killed: nobody else will end us
                with contextlib.suppress(LinkError):  # a gateway that is gone ends us by signal
                    link.send(message)
                if isinstance(message, Fault):
                    link.socket.setsockopt(zmq.LINGER, 500)  # the last word reaches the gateway
                    return

    def start(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        self.apart.roam(False)
        if self.name == "compute" and self.apart.core is not None:
            self.context.set(zmq.THREAD_AFFINITY_CPU_ADD, self.apart.core)
        self._heart.start()

    def beats(self) -> bool:
        """Whether the heart thread runs."""
        return self._heart.is_alive()

    def fault(self, reason: str) -> None:
        """Tells the gateway why this service ends."""
        self._outgoing.put(Fault(self.name, os.getpid(), reason))
        self._heart.join(timeout=1.0)

    def close(self) -> None:
        """Ends the heartbeat, writes the last spans, closes the links."""
        self._outgoing.put(None)
        if self._heart.is_alive():
            self._heart.join(timeout=2 * SEND_S)
        self._write_spans()
        self._delay.close()
        for link in self._links:
            link.close()


def run(name: str, body: Callable[[Service, Store], None]) -> NoReturn:
    """Runs a service to its end and exits with its status; called by its `__main__`."""
    try:
        settings = read_settings(os.environ)
    except (SettingError, InflashError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        with claim(settings.run_dir, name):
            status = _run_claimed(name, settings, body)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    # Not sys.exit: a library's thread or a socket that lingers must not keep a service alive.
    sys.stderr.flush()
    os._exit(status)


def _run_claimed(name: str, settings: Settings, body: Callable[[Service, Store], None]) -> int:
    context: zmq.Context[Any] = zmq.Context()
    service = Service(name, settings, context)
    service.start()
    try:
        body(service, Store.open(settings.store))
    except (UserError, InflashError) as error:
        service.log.error("fault", reason=str(error))
        print(f"{name}: {error}", file=sys.stderr)
        service.fault(str(error))
        return 1
    except Exception as error:
        service.log.error("fault", reason=repr(error), exc_info=True)
        service.fault(f"{type(error).__name__}: {error}")
        return 1
    finally:
        service.close()
        if not service.beats():  # it closed its own link: nothing holds the context open
            context.term()  # and what it had to say is sent
    service.log.info("stopped")
    return 0
