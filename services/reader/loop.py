"""The reader's loop: Fetch in, reads of the store into the cache, Resident out.

Owns the store's bundle files and the cache's bytes, whose only writer it is; fetches.py decides.
It trusts no message: a senseless one is counted and dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import zmq

from common.lifecycle import Service
from common.limits import POLL_S
from common.messages import Attached, Cache, Drop, Fetch, Release, Resident, Unreadable
from common.plan import make_plan
from common.segment import create_segment, segment_path
from common.store.store import Store
from services.reader.backends import Backend, Completion, Memory
from services.reader.fetches import BadFetchError, Fetches, Group
from services.reader.probe import choose_backend
from services.reader.verify import Verifier

PUBLISH_NS = int(POLL_S * 1e9)  # sooner than the heartbeat that carries the counters


def serve(service: Service, store: Store) -> None:
    """Makes the cache, says ready, and reads until asked to stop."""
    slots = make_plan(service.settings, store).slots
    geometry = store.geometry
    path = segment_path(service.run_dir)
    paths = [store.bundle_path(layer) for layer in range(geometry.layers)]
    with create_segment(path, sum(slots) * geometry.stride_bytes) as region:
        memory = np.frombuffer(region, np.uint8).reshape(-1, geometry.stride_bytes)
        choice = choose_backend(service.settings.backend, paths, memory)
        backend = choice.backend
        try:
            service.log.info(
                "backend", name=backend.name, direct=backend.direct, reason=choice.reason
            )
            reader = Reader(service, store, Fetches(geometry, slots, service.settings.window),
                            backend, memory)  # fmt: skip
            reader.introduce(Cache(str(path), sum(slots), geometry.stride_bytes))
            reader.run()
        finally:
            backend.close()  # first: nothing may read into memory that is unmapped


class Reader:
    """The loop and its hands: sockets, backend, clock."""

    def __init__(
        self, service: Service, store: Store, fetches: Fetches, backend: Backend, memory: Memory
    ) -> None:
        self._service = service
        self._store = store
        self._fetches = fetches
        self._backend = backend
        self._verifier = Verifier(store.checksums, store.geometry.layers, memory)
        self._fetch = service.receive_from("fetch")
        self._release = service.receive_from("release")
        self._resident = service.send_to("resident")
        self._reads = self._bytes_read = self._verify_ns = self._published_ns = 0

    def introduce(self, cache: Cache) -> None:
        """Says that we are ready and, to compute, first of all, where the cache is."""
        self._publish(time.monotonic_ns())
        self._service.ready(self._store.id)
        self._resident.send(cache)

    def run(self) -> None:
        """Turns until asked to stop."""
        poller = zmq.Poller()
        for source in (self._release.socket, self._fetch.socket, self._backend.fileno()):
            poller.register(source, zmq.POLLIN)
        while self._service.running():
            ready = dict(poller.poll(int(POLL_S * 1000)))
            if self._release.socket in ready:
                self._take_releases()
            if self._fetch.socket in ready:
                self._take_fetches()
            if self._backend.fileno() in ready:
                for completion in self._backend.completed():
                    self._finish(completion)
            self._go_on()

    def _take_releases(self) -> None:
        for message in self._release.receive():
            match message:
                case Release(step, layer, part):
                    self._fetches.release(step, layer, part)
                case Drop(step):
                    self._fetches.drop(step)
                case Attached(pid):
                    self._service.log.info("attached", pid=pid)

    def _take_fetches(self) -> None:
        for message in self._fetch.receive():
            assert isinstance(message, Fetch)
            try:
                self._send(self._fetches.take(message, time.monotonic_ns()))
            except BadFetchError as error:
                self._service.count("bad_messages")
                self._service.log.debug("refused", reason=str(error))

    def _go_on(self) -> None:
        """Begins the reads that can begin now."""
        now_ns = time.monotonic_ns()
        for step in self._fetches.groups(now_ns):
            if isinstance(step, Group):
                self._backend.submit(step.tag, step.layer, step.reads)
            else:
                self._resident.send(step)
        if now_ns > self._published_ns + PUBLISH_NS:
            self._publish(now_ns)

    def _finish(self, completion: Completion) -> None:
        """A group's reads are over: verifies what was never read before, and tells compute."""
        group = self._fetches.group(completion.tag)
        self._reads += len(group.reads)
        self._bytes_read += len(group.ids) * group.reads.stride_bytes
        if completion.error:
            first = group.reads.firsts[completion.failed]
            reason = self._blame(group.layer, int(group.ids[first]), completion.error)
            self._send(self._fetches.fail(completion.tag, group.ids, reason))
            return
        began_ns = time.monotonic_ns()
        wrong = self._verifier.wrong(group.layer, group.ids, group.reads.slots)
        now_ns = time.monotonic_ns()
        self._verify_ns += now_ns - began_ns
        if len(wrong):
            reason = self._blame(group.layer, int(wrong[0]), "checksum mismatch")
            self._send(self._fetches.fail(completion.tag, wrong, reason))
        else:
            self._send(self._fetches.land(completion.tag, now_ns))

    def _blame(self, layer: int, neuron: int, what: str) -> str:
        path = self._store.bundle_path(layer)
        return (
            f"layer {layer} neuron {neuron} ({path.parent.name}/{path.name}): {what};"
            f" run inflash verify {self._service.settings.store}"
        )

    def _send(self, messages: Iterable[Resident | Unreadable]) -> None:
        for message in messages:
            if isinstance(message, Unreadable):
                self._service.log.warning(
                    "unreadable",
                    request=message.request,
                    step=message.step,
                    layer=message.layer,
                    reason=message.reason,
                )
            self._resident.send(message)

    def _publish(self, now_ns: int) -> None:
        """The counters of `inflash status`."""
        self._published_ns = now_ns
        fetches, caches = self._fetches, self._fetches.caches
        self._service.counters |= {
            "hits": fetches.hits,
            "misses": fetches.misses,
            "late_fetches": fetches.late_fetches,
            "unknown_releases": fetches.unknown_releases,
            "evictions": sum(cache.evictions for cache in caches),
            "slots": sum(cache.slots for cache in caches),
            "slots_resident": sum(cache.resident for cache in caches),
            "reads": self._reads,
            "bytes_read": self._bytes_read,
            "verified": self._verifier.bundles,
            "verified_bytes": self._verifier.bundles * self._store.geometry.stride_bytes,
            "verify_ns": self._verify_ns,
        }
