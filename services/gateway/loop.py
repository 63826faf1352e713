"""The gateway's loop: the only place of it that touches sockets, the clock and processes.

Owns the clients' socket and the order of a turn: hear everyone, judge the services, then act on
what the pure modules decided. When a service is lost every request under way fails with its name,
what it left is removed, and the gateway ends with status 1.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zmq

from common import messages
from common.claim import claim_path
from common.errors import LinkError, UserError
from common.lifecycle import Service
from common.limits import POLL_S
from common.links import LINKS
from common.plan import make_plan
from common.segment import segment_path
from common.spans import NO_LAYER, NO_STEP
from common.store.store import Store
from inflash import _messages as wire
from inflash._rundir import socket_path
from inflash._wire import BadMessage
from services.gateway.clients import Clients
from services.gateway.decisions import Decision, Noted, ToClient, ToCompute, Traced
from services.gateway.health import Watch
from services.gateway.prompts import Prompts
from services.gateway.requests import Requests
from services.gateway.status import Report


def serve(service: Service, store: Store) -> None:
    """Serves until it is asked to stop; `UserError` when a service is lost."""
    plan = make_plan(service.settings, store)
    prompts = Prompts(store.config_dir, plan.context)  # seconds, for a large tokenizer
    report = Report(service.settings, store, plan, prompts)
    with Clients(service.run_dir) as clients:
        gateway = Gateway(service, clients, Watch(store.id, time.monotonic()), prompts, report)
        service.log.info("serving", **report.facts())
        service.ready(store.id)
        why = "the server is stopping"
        try:
            with gateway.metrics():
                gateway.run()
        except UserError:
            raise  # its requests have been told
        except Exception as error:
            why = f"a fault: {type(error).__name__}: {error}"
            raise
        finally:
            gateway.fail_all("gateway", why)


class Gateway:
    """The loop's state: its links, and the pure modules that decide."""

    def __init__(
        self, service: Service, clients: Clients, watch: Watch, prompts: Prompts, report: Report
    ):
        self._service = service
        self._clients = clients
        self._watch = watch
        self._report = report
        self._health = service.receive_from("health")
        self._answers = service.receive_from("answers")
        self._control = service.send_to("control")
        self._requests = Requests(
            prompts, service.counters, time.time_ns(), report.room, service.settings.trace == "on"
        )
        self._poller = zmq.Poller()
        for socket in (clients.socket, self._health.socket, self._answers.socket):
            self._poller.register(socket, zmq.POLLIN)

    @contextlib.contextmanager
    def metrics(self) -> Iterator[None]:
        """Serves Prometheus metrics meanwhile, where the settings say so."""
        if self._service.settings.metrics is None:
            yield
            return
        from services.gateway.metrics import Metrics, MetricsServer  # memory, for who wants them

        metrics = Metrics(self._report_now, self._requests.totals)
        with contextlib.closing(MetricsServer(self._service.settings.metrics, metrics)):
            yield

    def run(self) -> None:
        """Turns until the service is asked to stop; `UserError` when a service is lost."""
        was_ready = False
        while True:
            self._poller.poll(int(POLL_S * 1000))
            # Before anyone is judged: at a stop the others end too.
            if not self._service.running():
                return
            self._hear_services()
            self._hear_clients()
            if loss := self._watch.look(time.monotonic(), _is_alive):
                self._end_with(loss.service, loss.reason)
            if self._watch.ready and not was_ready:
                self._service.log.info("all ready")
                was_ready = True
            self._start()
            self._do(self._requests.tick(time.monotonic()))

    def fail_all(self, service: str, reason: str) -> None:
        """Ends every request under way, naming who failed it; those just arriving too."""
        for client, message in self._clients.receive():
            self._do(self._answer(client, message, time.monotonic()))
        self._do(self._requests.fail_all(service, reason, time.monotonic()))

    def _hear_services(self) -> None:
        for message in self._health.receive():
            if not self._watch.receive(message, self._claimed_pid, time.monotonic()):
                self._service.count("bad_messages")
        for message in self._answers.receive():
            now = time.monotonic()
            match message:
                case messages.Token():
                    self._do(self._requests.token(message, now))
                    self._trace_delivery(message.request, now)
                case messages.Prefilling():
                    self._do(self._requests.prefilling(message, now))
                case messages.Done():
                    self._do(self._requests.done(message, now))

    def _trace_delivery(self, number: int, began: float) -> None:
        request = self._requests.running.get(number)
        if request and request.trace:
            fields = (request.new_tokens - 1,)
            self._trace(Traced("deliver", number, began, time.monotonic(), fields))

    def _trace(self, span: Traced) -> None:
        times = int(span.start * 1e9), int(span.end * 1e9)
        at = span.request, NO_STEP, NO_LAYER
        self._service.spans.add(span.name, *at, *times, *span.fields)

    def _hear_clients(self) -> None:
        for client, message in self._clients.receive():
            self._do(self._answer(client, message, time.monotonic()))
            self._start()  # before the next is judged by the length of the queue

    def _start(self) -> None:
        if self._watch.ready:
            self._do(self._requests.start(time.monotonic()))

    def _answer(self, client: bytes, message: Any, now: float) -> list[Decision]:
        match message:
            case wire.Generate():
                if self._requests.full:  # is it, or are they gone who fill it?
                    self._do(self._requests.probe(now))
                return self._requests.generate(client, message, now)
            case wire.Cancel(request=number):
                return self._requests.cancel(client, number, now)
            case wire.Status(request=number):
                return [ToClient(client, wire.StatusReply(number, self._report_now()))]
            case BadMessage(tag="Generate", decoded={"request": number}):
                return self._requests.refuse(client, number, str(message))
        self._service.count("bad_messages")
        return []

    def _report_now(self) -> dict[str, Any]:
        return self._report.make(self._watch, self._requests, self._service.all_counters())

    def _do(self, decisions: Iterable[Decision]) -> None:
        """Acts on decisions, and on those that follow from a client that is gone."""
        todo = list(decisions)
        while todo:
            decision = todo.pop(0)
            match decision:
                case Noted(event, fields):
                    self._service.log.info(event, **fields)
                case Traced():
                    self._trace(decision)
                case ToCompute(message):
                    self._tell_compute(message)
                case ToClient(client, message):
                    if not self._clients.send(client, message):
                        todo += self._requests.client_gone(client)

    def _tell_compute(self, message: Any) -> None:
        try:
            self._control.send(message)
        except LinkError as error:
            self._watch.lose("compute", str(error))

    def _end_with(self, service: str, reason: str) -> None:
        self.fail_all(service, reason)
        for path in leftovers(self._service.run_dir, service):
            path.unlink(missing_ok=True)
        raise UserError(f"{service}: {reason}")

    def _claimed_pid(self, service: str) -> int | None:
        """The process that holds a service's claim, as common/claim.py writes it."""
        try:
            return int(claim_path(self._service.run_dir, service).read_text())
        except (OSError, ValueError):
            return None


def leftovers(run_dir: Path, service: str) -> list[Path]:
    """The files that a killed service leaves: its claim, its sockets, and the reader's cache."""
    segment = [segment_path(run_dir)] if service == "reader" else []
    links = [link.name for link in LINKS.values() if link.receiver == service]
    sockets = [socket_path(run_dir, name) for name in links]
    return [claim_path(run_dir, service), *sockets, *segment]


def _is_alive(pid: int) -> bool:
    """Whether a process runs: a zombie, whose parent has not asked for its status, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no /proc, or it ended just now: the next look tells
        return True
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
