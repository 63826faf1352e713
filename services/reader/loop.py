"""The reader's loop: Fetch in, reads of the store into the cache, Resident out.

Owns the store's bundle files and the cache's bytes, whose only writer it is; fetches.py decides.
It trusts no message: a senseless one is counted and dropped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

import numpy as np
import zmq

from common.lifecycle import Service
from common.limits import POLL_S
from common.messages import Attached, Cache, Drop, Fetch, Release, Resident, Unreadable
from common.plan import make_plan
from common.policy import make_policy
from common.segment import create_segment, segment_path
from common.store.store import Store
from services.reader.ahead import is_whole
from services.reader.backends import RECHECK_S, Backend, Completion, Memory
from services.reader.cache import Ids
from services.reader.fetches import BadFetchError, Fetches
from services.reader.footprint import Footprint
from services.reader.groups import Group
from services.reader.probe import choose_backend
from services.reader.slowed import Slowed
from services.reader.verify import Verifier

PAUSE_NS = int(0.2e9)  # with nothing to read for so long, there is no work
BUSY_NS = int(1e9)  # the time over which the drive's busy share is averaged
PUBLISH_NS = int(POLL_S * 1e9)  # sooner than the heartbeat that carries the counters


def serve(service: Service, store: Store) -> None:
    """Makes the cache, says ready, and reads until asked to stop."""
    settings = service.settings
    plan = make_plan(settings, store)
    slots = plan.slots
    policy = make_policy(settings.policy, settings.window)
    geometry = store.geometry
    path = segment_path(service.run_dir)
    paths = [store.bundle_path(layer) for layer in range(geometry.layers)]
    with create_segment(path, sum(slots) * geometry.stride_bytes) as region:
        memory = np.frombuffer(region, np.uint8).reshape(-1, geometry.stride_bytes)
        choice = choose_backend(settings.backend, paths, memory)
        backend = choice.backend
        if settings.slow.reads_share:
            backend = Slowed(backend, settings.slow)
        try:
            service.log.info(
                "backend", name=backend.name, direct=backend.direct, reason=choice.reason
            )
            scope = "global" if settings.slots == "global" else "layer"
            fetches = Fetches(geometry, slots, policy, scope, settings.extras, settings.bundling)
            footprint = Footprint(fetches, plan, region, path)
            reader = Reader(service, store, fetches, footprint, backend, memory)
            reader.introduce(Cache(str(path), sum(slots), geometry.stride_bytes))
            reader.run()
        finally:
            backend.close()  # first: nothing may read into memory that is unmapped


class ReadTime:
    """Counts the time in which at least one group is being read."""

    def __init__(self) -> None:
        self._groups = 0
        self._since_ns = 0
        self._ns = 0
        self.busy = 1.0
        """The share of the time lately; a pause of the work is no time."""

    @property
    def reading(self) -> bool:
        return self._groups > 0

    def begin(self, now_ns: int) -> None:
        self._count(now_ns)
        self._groups += 1

    def end(self, now_ns: int, groups: int) -> None:
        self._count(now_ns)
        self._groups -= groups

    def take(self, now_ns: int) -> int:
        """The time since the last take, ns."""
        self._count(now_ns)
        taken, self._ns = self._ns, 0
        return taken

    def _count(self, now_ns: int) -> None:
        passed_ns = now_ns - self._since_ns
        if self._groups:
            self._ns += passed_ns
        if self._groups or passed_ns < PAUSE_NS:
            part = 1 - math.exp(-passed_ns / BUSY_NS)
            self.busy += part * ((self._groups > 0) - self.busy)
        self._since_ns = now_ns


class Reader:
    """The loop and its hands: sockets, backend, clock."""

    def __init__(
        self,
        service: Service,
        store: Store,
        fetches: Fetches,
        footprint: Footprint,
        backend: Backend,
        memory: Memory,
    ) -> None:
        self._service = service
        self._store = store
        self._fetches = fetches
        self._footprint = footprint
        self._backend = backend
        self._verifier = Verifier(store.checksums, store.geometry.layers, memory)
        self._fetch = service.receive_from("fetch")
        self._release = service.receive_from("release")
        self._resident = service.send_to("resident")
        self._read_time = ReadTime()
        self._begun_ns: dict[int, int] = {}  # by the tag of a group that is being read
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
            wait_s = RECHECK_S if self._read_time.reading else POLL_S
            ready = dict(poller.poll(int(wait_s * 1000)))
            # First what has landed: a demand that comes with it finds its prefetch there.
            if self._backend.fileno() in ready or (not ready and self._read_time.reading):
                completions = self._backend.completed()
                self._read_time.end(time.monotonic_ns(), len(completions))
                for completion in completions:
                    self._finish(completion)
            if self._release.socket in ready:
                self._take_releases()
            if self._fetch.socket in ready:
                self._take_fetches()
            self._go_on()

    def _take_releases(self) -> None:
        for message in self._release.receive():
            match message:
                case Release(step, layer, part):
                    self._send(self._fetches.release(step, layer, part, time.monotonic_ns()))
                case Drop(step):
                    self._fetches.drop(step)
                case Attached(pid):
                    self._service.log.info("attached", pid=pid)

    def _take_fetches(self) -> None:
        for message in self._fetch.receive():
            assert isinstance(message, Fetch)
            self._service.apart.roam(is_whole(message, self._store.geometry.neurons))
            began_ns = time.monotonic_ns()
            try:
                answers = self._fetches.take(message, began_ns, self._read_time.busy)
                self._send(answers)
                if message.trace:
                    left = sum(max(answer.left, 0) for answer in answers)
                    self._trace("fetch", message, began_ns, len(message.ids) // 4, left)
            except BadFetchError as error:
                self._service.count("bad_messages")
                self._service.log.debug("refused", reason=str(error))

    def _go_on(self) -> None:
        """Begins the reads that can begin now."""
        now_ns = time.monotonic_ns()
        if change := self._footprint.fit(now_ns / 1e9):
            self._service.log.info("cache resized", slots_before=change[0], slots=change[1])
        for group in self._fetches.groups():
            self._begun_ns[group.tag] = begun_ns = time.monotonic_ns()
            self._read_time.begin(begun_ns)
            self._backend.submit(group.tag, group.layer, group.reads)
        if now_ns > self._published_ns + PUBLISH_NS:
            self._publish(now_ns)

    def _finish(self, completion: Completion) -> None:
        """A group's reads are over: verifies what was never read before, and tells compute."""
        group = self._fetches.group(completion.tag)
        read_ns = self._begun_ns.pop(completion.tag)
        self._reads += len(group.reads)
        self._bytes_read += group.bytes_read
        if completion.error:
            neuron = group.neuron(completion.failed)
            reason = self._blame(group.layer, neuron, completion.error)
            self._fail(group, group.ids, reason)
            return
        began_ns = time.monotonic_ns()
        wrong = self._verifier.wrong(group.layer, group.ids, group.slots)
        now_ns = time.monotonic_ns()
        self._verify_ns += now_ns - began_ns
        if len(wrong):
            reason = self._blame(group.layer, int(wrong[0]), "checksum mismatch")
            self._fail(group, wrong, reason)
        else:
            answers = self._fetches.land(completion.tag, now_ns)
            self._send(answers)
            if group.fetch.trace:
                part = answers[0].part if answers else -1
                counts = len(group.ids), len(group.reads), group.bytes_read, now_ns - began_ns
                self._trace("read", group.fetch, read_ns, part, *counts, until_ns=began_ns)

    def _trace(
        self, name: str, fetch: Fetch, began_ns: int, *fields: int, until_ns: int = 0
    ) -> None:
        """A span of a fetch, until now if nothing else is said."""
        until_ns = until_ns or time.monotonic_ns()
        at = fetch.request, fetch.step, fetch.layer, began_ns, until_ns
        self._service.spans.add(name, *at, int(fetch.prefetch), *fields)

    def _fail(self, group: Group, bad: Ids, reason: str) -> None:
        """A demand's failure is its request's and goes to compute; a prefetch's fails nobody."""
        fetch = group.fetch
        answers = self._fetches.fail(group.tag, bad, reason, time.monotonic_ns())
        if fetch.prefetch or any(isinstance(answer, Unreadable) for answer in answers):
            self._service.log.warning(
                "unreadable_prefetch" if fetch.prefetch else "unreadable",
                request=fetch.request,
                step=fetch.step,
                layer=fetch.layer,
                reason=reason,
            )
        self._send(answers)

    def _blame(self, layer: int, neuron: int, what: str) -> str:
        path = self._store.bundle_path(layer)
        return (
            f"layer {layer} neuron {neuron} ({path.parent.name}/{path.name}): {what};"
            f" run inflash verify {self._service.settings.store}"
        )

    def _send(self, messages: Iterable[Resident | Unreadable]) -> None:
        for message in messages:
            if isinstance(message, Resident):
                read_ns = self._read_time.take(time.monotonic_ns())
                message = dataclasses.replace(message, read_ns=read_ns)
            self._resident.send(message)

    def _publish(self, now_ns: int) -> None:
        """The counters of `inflash status`."""
        self._published_ns = now_ns
        fetches, ahead, pools = self._fetches, self._fetches.ahead, self._fetches.each_pool()
        self._service.counters |= {
            "hits": fetches.hits,
            "misses": fetches.misses,
            "late_fetches": fetches.late_fetches,
            "unknown_releases": fetches.unknown_releases,
            "prefetched": ahead.prefetched,
            "wasted": ahead.wasted,
            "prefetch_dropped": ahead.dropped,
            "late_prefetches": fetches.late_prefetches,
            "unreadable_prefetches": ahead.unreadable,
            "evictions": sum(pool.evictions for pool in pools),
            "drive_busy_permille": round(self._read_time.busy * 1000),
            "slots": sum(pool.usable for pool in pools),
            "slots_resident": sum(pool.resident for pool in pools),
            "reads": self._reads,
            "bytes_read": self._bytes_read,
            "verified": self._verifier.bundles,
            "verified_bytes": self._verifier.bundles * self._store.geometry.stride_bytes,
            "verify_ns": self._verify_ns,
        }
