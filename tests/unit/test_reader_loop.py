"""The reader as a whole: a real store, real reads, real sockets. The tests are its peers."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from common.config import Settings
from common.errors import UserError
from common.lifecycle import Service
from common.links import Link
from common.messages import Attached, Cache, Drop, Fetch, Ready, Release, Resident, Unreadable
from common.segment import attach_segment, segment_path
from common.store.store import Store
from services.reader.loop import ReadTime, serve

pytestmark = pytest.mark.timeout(60)

CHECKOUT = Path(__file__).resolve().parents[2]
WAIT_S = 5.0


class Peers:
    """The predictor and compute, to one running reader."""

    def __init__(self, service: Service, store: Store):
        self.service = service
        self.store = store
        self.fetch = Link(service.context, service.run_dir, "fetch", receive=False)
        self.release = Link(service.context, service.run_dir, "release", receive=False)
        self.resident = Link(service.context, service.run_dir, "resident", receive=True)
        self.began_ns = time.monotonic_ns()
        self._inbox: list[Any] = []

    def attach(self) -> None:
        cache = self.next()
        assert isinstance(cache, Cache)
        region = attach_segment(Path(cache.path), cache.slots * cache.stride_bytes)
        self.memory = np.frombuffer(region, np.uint8).reshape(cache.slots, cache.stride_bytes)
        self.release.send(Attached(os.getpid()))
        # Each link connects in its own time; a Release that comes late is a slot that is held.
        log = self.service.run_dir / "log" / "reader.jsonl"
        deadline = time.monotonic() + WAIT_S
        while '"attached"' not in log.read_text():
            assert time.monotonic() < deadline, "the reader does not hear of Attached"
            time.sleep(0.01)

    def ask(self, step: int, ids: object, layer: int = 1, prefetch: bool = False) -> None:
        frame = np.array(ids, "<i4").tobytes()
        self.fetch.send(Fetch(1, step, layer, prefetch, time.monotonic_ns(), frame))

    def next(self) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not self._inbox:
            assert time.monotonic() < deadline, f"the reader said nothing for {WAIT_S} s"
            self.resident.socket.poll(100)
            self._inbox += self.resident.receive()
        return self._inbox.pop(0)

    def parts(self, step: int, ids: object, layer: int = 1) -> list[Resident]:
        """All parts of a fetch, each with the right bytes in its slots, each released."""
        self.ask(step, ids, layer)
        stored = np.fromfile(self.store.bundle_path(layer), np.uint8)
        stored = stored.reshape(self.store.geometry.neurons, -1)
        parts: list[Resident] = []
        while not parts or parts[-1].left:
            part = self.next()
            assert isinstance(part, Resident), part
            assert (part.step, part.layer) == (step, layer)
            slots = np.frombuffer(part.slots, "<i4")
            assert (self.memory[slots] == stored[np.frombuffer(part.ids, "<i4")]).all()
            now_ns = time.monotonic_ns()
            assert part.named_ns <= part.taken_ns <= part.landed_ns <= now_ns
            assert 0 <= part.read_ns <= now_ns - self.began_ns
            self.release.send(Release(step, layer, part.part))
            parts.append(part)
        found = np.concatenate([np.frombuffer(part.ids, "<i4") for part in parts])
        named = len(parts[0].ids) // 4 - parts[0].extra
        found = np.delete(found, range(named, named + parts[0].extra))
        assert sorted(found) == sorted(np.array(ids, np.int64))
        return parts

    def counters(self, wait_for: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        deadline = time.monotonic() + WAIT_S
        while not wait_for(counters := self.service.all_counters()):
            assert time.monotonic() < deadline, counters
            time.sleep(0.02)
        return counters


def close(service: Service) -> None:
    """What the end of a service's process does."""
    service.close()
    service._log_file.close()


@contextlib.contextmanager
def reading(
    store: Store, run_dir: Path, slots: int, scope: str = "layer", **options: Any
) -> Iterator[Peers]:
    """A reader of `store`, in a thread, with so many slots a layer."""
    size = slots * store.geometry.layers * store.geometry.stride_bytes
    settings = Settings(store=store.path, run_dir=run_dir, cache=str(size), slots=scope, **options)
    faults: list[BaseException] = []

    def body() -> None:
        try:
            serve(service, store)
        except BaseException as error:
            faults.append(error)

    with zmq.Context() as context:
        service = Service("reader", settings, context)
        peers = Peers(service, store)
        thread = threading.Thread(target=body)
        thread.start()
        try:
            peers.attach()
            yield peers
        finally:
            service.stop()
            thread.join(WAIT_S)
            for link in (peers.fetch, peers.release, peers.resident):
                link.close()
            close(service)
    assert not thread.is_alive()
    assert not faults, faults
    assert not segment_path(run_dir).exists()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: a socket's has 107 bytes. Its socket files are the launcher's to remove."""
    with tempfile.TemporaryDirectory(prefix="inflash-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def store(made: Any) -> Store:
    found: Store = made.store("opt")
    assert (found.geometry.layers, found.geometry.neurons) == (3, 256)
    return found


@pytest.fixture(params=["aio", "threads"])
def peers(request: pytest.FixtureRequest, store: Store, run_dir: Path) -> Iterator[Peers]:
    with reading(store, run_dir, slots=64, backend=request.param) as peers:
        yield peers


def test_hits_and_misses(peers: Peers):
    first = peers.parts(1, [3, 4, 5, 90])
    assert [(p.part, p.reads, p.bytes_read) for p in first] == [(0, 0, 0), (1, 2, 4 * 4096)]
    assert first[1].read_ns > 0
    second = peers.parts(2, [4, 5, 6])
    assert [np.frombuffer(p.ids, "<i4").tolist() for p in second] == [[4, 5], [6]]
    assert [(p.part, p.left, p.reads) for p in second] == [(0, 1, 0), (1, 0, 1)]
    counters = peers.counters(lambda c: c["verified"] == 5)
    assert counters["misses"] == 5
    assert counters["reads"] == 3
    assert counters["bytes_read"] == counters["verified_bytes"] == 5 * 4096
    assert (counters["verified"], counters["slots"], counters["slots_resident"]) == (5, 192, 5)
    assert counters["bad_messages"] == counters["unknown_releases"] == 0


def test_the_same_ids_again_read_nothing(peers: Peers):
    ids = np.arange(0, 128, 2)
    assert sum(p.reads for p in peers.parts(1, ids)) == 64
    (again,) = peers.parts(2, ids)
    assert (again.part, again.reads, again.bytes_read) == (0, 0, 0)


def test_nothing_is_asked(peers: Peers):
    (part,) = peers.parts(1, [])
    assert (part.part, part.left) == (0, 0)


def test_layers_stream_through_few_slots(store: Store, run_dir: Path):
    with reading(store, run_dir, slots=5) as peers:
        for step in range(1, 4):
            for layer in range(3):
                parts = peers.parts(step, np.arange(256), layer)
                assert max(len(p.ids) // 4 for p in parts[1:]) <= 2
        counters = peers.counters(lambda c: c["bytes_read"] == (9 * 256 - 30) * 4096)
        assert counters["hits"] == 2 * 3 * 5, "what is there is taken before it is evicted"
        assert counters["verified"] == 3 * 256, "each bundle is verified once"
        assert counters["evictions"] == counters["misses"] - 15 == 9 * 256 - 45


def test_the_window_is_kept(store: Store, run_dir: Path):
    with reading(store, run_dir, slots=64, policy="window", window=1) as peers:
        peers.parts(1, [1, 2])
        peers.parts(2, [2, 3])
        assert [p.part for p in peers.parts(3, [2, 3])] == [0]
        assert [p.part for p in peers.parts(4, [1])] == [0, 1]


def test_what_is_read_ahead_is_there_when_its_layer_asks(peers: Peers):
    peers.ask(1, [3, 4, 8], prefetch=True)
    peers.counters(lambda c: c["slots_resident"] == 3)
    first, second = peers.parts(1, [3, 4, 5])
    assert (first.left, first.prefetched, first.reads, first.bytes_read) == (1, 2, 2, 3 * 4096)
    assert (first.wasted_bytes, second.reads, second.bytes_read) == (4096, 1, 4096)
    assert first.read_ns > 0
    assert second.read_ns > 0
    peers.ask(1, [9], prefetch=True)
    counters = peers.counters(lambda c: c["late_prefetches"] == 1)
    assert (counters["hits"], counters["misses"]) == (2, 1)
    assert (counters["prefetched"], counters["wasted"]) == (3, 1)
    assert (counters["prefetch_dropped"], counters["unreadable_prefetches"]) == (0, 0)


def test_one_pool_for_all_layers(store: Store, run_dir: Path):
    with reading(store, run_dir, slots=20, scope="global") as peers:
        peers.parts(1, np.arange(50), layer=0)
        assert peers.parts(2, np.arange(50), layer=0)[0].left == 0, "more than a layer's share"
        for layer in range(3):
            peers.ask(3, np.arange(9), layer=layer, prefetch=True)
            peers.parts(3, np.arange(256), layer=layer)


def test_a_step_is_dropped_in_mid_flight(peers: Peers):
    peers.ask(1, np.arange(256))
    first = peers.next()
    assert isinstance(first, Resident)
    assert first.left > 0
    peers.release.send(Drop(1))
    peers.release.send(Release(99, 0, 0))
    peers.counters(lambda c: c["unknown_releases"] == 1)  # so the Drop was heard
    peers.ask(2, [], layer=0)
    parts = [first]
    while (message := peers.next()).step == 1:
        parts.append(message)
    assert sum(len(p.ids) // 4 for p in parts) <= 64, "none was released"
    for step in range(3, 6):
        peers.parts(step, np.arange(256))
    assert peers.counters(lambda c: c["slots_resident"] == 64)["bad_messages"] == 0


def test_a_corrupted_bundle_fails_its_fetch_and_no_other(store: Store, run_dir: Path, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store.path, folder)
    with store.bundle_path(1).open("rb") as file:
        good = file.read()
    bad = bytearray(good)
    bad[17 * 4096 + 100] ^= 1
    (folder / "layers" / "001.bundles").write_bytes(bad)
    broken = Store.open(folder)
    with reading(broken, run_dir, slots=64) as peers:
        for step in (1, 2):
            peers.ask(step, [15, 16, 17, 18])
            assert peers.next().left == (4 if step == 1 else 1)  # the others came right
            assert peers.next() == Unreadable(
                1,
                step,
                1,
                "layer 1 neuron 17 (layers/001.bundles): checksum mismatch;"
                f" run inflash verify {folder}",
            )
            peers.release.send(Drop(step))
        assert len(peers.parts(3, [15, 16, 18])) == 1
        peers.parts(4, np.arange(256), layer=0)
        log = (run_dir / "log" / "reader.jsonl").read_text()
        assert '"event": "unreadable"' in log


def test_a_corrupted_bundle_read_ahead_fails_nobody_until_it_is_needed(
    store: Store, run_dir: Path, tmp_path
):
    folder = tmp_path / "store"
    shutil.copytree(store.path, folder)
    with (folder / "layers" / "001.bundles").open("r+b") as file:
        file.seek(17 * 4096 + 100)
        byte = file.read(1)[0]
        file.seek(17 * 4096 + 100)
        file.write(bytes([byte ^ 1]))
    with reading(Store.open(folder), run_dir, slots=64) as peers:
        peers.ask(1, [16, 17, 18], prefetch=True)
        peers.counters(lambda c: c["unreadable_prefetches"] == 1)
        (part,) = peers.parts(1, [16, 18])
        assert (part.prefetched, part.bytes_read, part.wasted_bytes) == (2, 3 * 4096, 4096)
        peers.ask(2, [17])
        assert peers.next().left == 1
        assert isinstance(peers.next(), Unreadable)
    log = (run_dir / "log" / "reader.jsonl").read_text()
    assert log.count('"event": "unreadable_prefetch"') == log.count('"event": "unreadable"') == 1
    assert "layer 1 neuron 17 (layers/001.bundles): checksum mismatch" in log


def test_a_file_that_shrinks_fails_the_fetch(store: Store, run_dir: Path, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store.path, folder)
    with reading(Store.open(folder), run_dir, slots=64) as peers:
        os.truncate(folder / "layers" / "001.bundles", 100 * 4096)
        peers.ask(1, [200, 201])
        assert peers.next().left == 2
        answer = peers.next()
        assert isinstance(answer, Unreadable)
        assert answer.reason == (
            "layer 1 neuron 200 (layers/001.bundles): short read: 0 of 8,192 bytes;"
            f" run inflash verify {folder}"
        )
        peers.parts(2, [1, 2], layer=0)


def test_read_time_is_counted_once_however_much_is_read():
    time_read = ReadTime()
    time_read.begin(10)
    time_read.begin(15)
    assert time_read.take(17) == 7
    time_read.end(20, 1)
    time_read.end(30, 1)
    time_read.begin(50)
    time_read.end(54, 1)
    assert time_read.take(100) == 13 + 4
    assert time_read.take(200) == 0


def test_the_drive_is_busy_for_the_share_of_the_time_in_which_it_reads():
    time_read = ReadTime()
    assert time_read.busy == 1, "nothing is known: what is read ahead has to be sure"
    now_ns = 0
    for _ in range(500):
        time_read.begin(now_ns)
        time_read.end(now_ns + 2_000_000, 1)
        now_ns += 10_000_000
    assert 0.19 < time_read.busy < 0.21
    before = time_read.busy
    time_read.begin(now_ns + 60_000_000_000)
    assert abs(time_read.busy - before) < 0.01, "a minute without work does not count"


def mutations(rng: random.Random, good: list[bytes]) -> list[bytes]:
    """A message that is random, or a good one with a byte changed or a frame gone or doubled."""
    kind = rng.randrange(5)
    if kind == 0:
        return [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 4))]
    if kind == 1:
        return good * 2
    if kind == 2 and len(good) > 1:
        return good[:-1]
    if kind == 3:
        header = msgpack.unpackb(good[0])
        header[rng.randrange(len(header))] = rng.choice([-1, 2**62, "x", None, 0.5, [], {}])
        return [msgpack.packb(header), *good[1:]]
    frames = [bytearray(frame) for frame in good]
    frame = rng.choice([f for f in frames if f])
    frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    return [bytes(f) for f in frames]


def test_a_thousand_bad_messages_to_each_socket(peers: Peers):
    rng = random.Random(0)
    fetch = Fetch(1, 77, 1, False, 0, np.arange(5, 9, dtype="<i4").tobytes())
    goods = [(peers.fetch, fetch), (peers.release, Release(77, 1, 0)), (peers.release, Drop(77))]
    for link, message in goods:
        frames = [bytes(f) for f in link.spec.codec.encode(message)]
        for i in range(1000):
            link.socket.send_multipart(mutations(rng, frames))
            if i % 50 == 0:
                put_away(peers)
    peers.fetch.socket.send(bytes(9 << 20))  # too large
    counters = peers.counters(lambda c: c["bad_messages"] > 1500)
    assert counters["bad_messages"] < 3000, "some mutations are good messages"
    put_away(peers)
    peers.parts(10_000, np.arange(256))
    assert peers.parts(10_001, np.arange(10, 20), layer=2)[-1].left == 0


def put_away(peers: Peers) -> None:
    """As compute does with parts that it never asked for."""
    while peers.resident.socket.poll(50):
        for message in peers.resident.receive():
            if isinstance(message, Resident):
                peers.release.send(Release(message.step, message.layer, message.part))


def test_a_backend_that_cannot_be_had_is_named(store: Store, run_dir: Path, monkeypatch):
    monkeypatch.setattr("services.reader.aio._CALLS", {})
    settings = Settings(store=store.path, run_dir=run_dir, cache="50%", backend="aio")
    with zmq.Context() as context:
        service = Service("reader", settings, context)
        with pytest.raises(UserError, match=r"INFLASH_BACKEND: aio cannot .* io_submit is not"):
            serve(service, store)
        close(service)
    assert not segment_path(run_dir).exists()


def test_auto_falls_back_and_says_why(store: Store, run_dir: Path, monkeypatch):
    monkeypatch.setattr("services.reader.aio._CALLS", {})
    monkeypatch.delattr(os, "O_DIRECT")
    with reading(store, run_dir, slots=64) as peers:
        peers.parts(1, [1, 2, 3])
    log = (run_dir / "log" / "reader.jsonl").read_text()
    assert '"name": "threads", "direct": false' in log
    assert "through the page cache: a probe read bundle 0 right; refused were aio: io_submit" in log


def test_the_process_says_ready_and_ends_when_asked(store: Store, run_dir: Path):
    environ = os.environ | {
        "INFLASH_STORE": str(store.path),
        "INFLASH_RUN_DIR": str(run_dir),
        "INFLASH_CACHE": "25%",
    }
    with zmq.Context() as context, Link(context, run_dir, "health", receive=True) as health:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.reader"], cwd=CHECKOUT, env=environ
        )
        try:
            assert health.socket.poll(20_000), "no Ready within 20 s"
            (ready, *_) = health.receive()
            assert isinstance(ready, Ready)
            assert (ready.service, ready.store_id) == ("reader", store.id)
            segment = segment_path(run_dir)
            assert segment.stat().st_mode & 0o777 == 0o600
            assert segment.stat().st_size == 3 * 64 * 4096
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
        assert not segment.exists()
        assert not (run_dir / "reader.pid").exists()
