"""A real gateway process and real clients; the other services are played at the links' edge."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import inflash
from common import messages
from common.launch import CHECKOUT
from common.limits import QUEUE_MAX
from common.segment import segment_path
from inflash import _messages as wire
from inflash._rundir import CLIENT_LINK, endpoint
from tests.conftest import Made
from tests.played import PATIENCE_S, Served, serving_played

LOST_S = 5.0  # what the project promises: a failure is told within it


@pytest.fixture
def starting(run_dir: Path, made: Made) -> Iterator[Served]:
    """A gateway whose peers have not said Ready."""
    with serving_played(run_dir, made.store("opt")) as served:
        yield served


@pytest.fixture
def served(starting: Served) -> Served:
    starting.peers.start()
    starting.until("ready")
    return starting


def test_an_answer_with_text_logits_and_figures(served: Served) -> None:
    with served.client() as client:
        generation = client.generate("def ", max_new_tokens=2, logits=True)
        admit = served.peers.expect(messages.Admit)
        assert admit.logits
        assert admit.sampling.max_new_tokens == 2
        logits = b"\0\0\x80?" * 300
        for _ in range(2):
            served.peers.token(admit.request, 70, logits)
        served.peers.done(admit.request)
        tokens = list(generation)
        assert [t.id for t in tokens] == [70, 70]
        assert tokens[0].logits is not None
        assert tokens[0].logits.tolist() == [1.0] * 300
        assert generation.text == "".join(t.text for t in tokens) != ""
        assert generation.finish_reason == "length"
        assert generation.stats is not None
        assert generation.stats.new_tokens == 2
        assert generation.stats.bytes_read == 7
        assert 0 < generation.stats.time_to_first_token_s < PATIENCE_S


def test_two_answers_of_one_client_one_after_the_other(served: Served) -> None:
    with served.client() as client:
        first, second = (client.generate([5], max_new_tokens=9) for _ in range(2))
        one = served.peers.expect(messages.Admit)
        served.peers.nothing_more()
        served.peers.token(one.request, 5)
        served.peers.done(one.request)
        two = served.peers.expect(messages.Admit)
        served.peers.token(two.request, 6)
        served.peers.done(two.request, "stop")
        assert [t.id for t in second] == [6]
        assert [t.id for t in first] == [5]
        assert (first.finish_reason, second.finish_reason) == ("length", "stop")


def test_many_tasks_share_an_async_client(served: Served) -> None:
    count = 5

    def compute() -> None:
        for _ in range(count):
            admit = served.peers.expect(messages.Admit)
            for token_id in memoryview(admit.prompt).cast("i"):
                served.peers.token(admit.request, token_id)
            served.peers.done(admit.request)

    async def ask(client: inflash.AsyncClient, number: int) -> list[int]:
        return [t.id async for t in await client.generate([number, number + 1])]

    async def ask_all() -> list[list[int]]:
        async with inflash.AsyncClient(served.run_dir) as client:
            answers = await asyncio.gather(*(ask(client, n) for n in range(count)))
            assert (await client.status())["state"] == "ready"
            return answers

    player = threading.Thread(target=compute)
    player.start()
    assert asyncio.run(ask_all()) == [[n, n + 1] for n in range(count)]
    player.join()


def test_cancel_reaches_compute_and_ends_the_iterator(served: Served) -> None:
    with served.client() as client:
        generation = client.generate([5])
        admit = served.peers.expect(messages.Admit)
        served.peers.token(admit.request)
        next(generation)
        generation.cancel()
        assert served.peers.expect(messages.Abort).request == admit.request
        served.peers.done(admit.request, "cancelled")
        assert list(generation) == []
        assert generation.finish_reason == "cancelled"


def test_an_async_answer_is_cancelled_on_leaving(served: Served) -> None:
    async def ask() -> None:
        async with inflash.AsyncClient(served.run_dir) as client:
            async with await client.generate([5]):
                admit = served.peers.expect(messages.Admit)
            assert served.peers.expect(messages.Abort).request == admit.request
            waiting = await client.generate([6])
            await waiting.cancel()
            assert [t async for t in waiting] == []
            assert waiting.finish_reason == "cancelled"

    asyncio.run(ask())


def test_a_full_queue_refuses_and_the_rest_is_answered(served: Served) -> None:
    with served.client() as client:
        generations = [client.generate([5]) for _ in range(QUEUE_MAX + 2)]
        with pytest.raises(inflash.RequestRefused, match="the queue is full"):
            list(generations[-1])
        queue = client.status()["queue"]
        assert queue | {"running": 1, "waiting": QUEUE_MAX, "max": QUEUE_MAX} == queue
        assert queue["room_taken_tokens"] == queue["room_tokens"] == 64, "as long as the context"
        for generation in generations[:-1]:
            admit = served.peers.expect(messages.Admit)
            served.peers.done(admit.request)
            assert list(generation) == []


def test_a_client_that_vanishes_frees_the_machine(served: Served) -> None:
    with served.client() as other:
        with served.client() as client:
            client.generate([5])
            client.generate([6])
            admit = served.peers.expect(messages.Admit)
        mine = other.generate([7])
        # Nothing is being sent to the client that is gone: the sign of life finds out.
        assert served.peers.expect(messages.Abort).request == admit.request
        served.peers.done(admit.request, "cancelled")
        admit = served.peers.expect(messages.Admit)
        assert memoryview(admit.prompt).cast("i").tolist() == [7]
        served.peers.done(admit.request)
        assert list(mine) == []
        assert other.status()["counters"]["vanished"] == 2


def test_a_client_that_is_stopped_frees_the_machine(served: Served) -> None:
    command = [sys.executable, "-m", "inflash", "generate", "a", "--run-dir", str(served.run_dir)]
    process = subprocess.Popen(command, cwd=CHECKOUT)
    try:
        admit = served.peers.expect(messages.Admit)
        process.send_signal(signal.SIGSTOP)
        assert served.peers.expect(messages.Abort).request == admit.request
        served.peers.done(admit.request, "cancelled")
    finally:
        process.kill()
        process.wait()


def test_a_queue_full_of_clients_that_are_gone_is_not_full(served: Served) -> None:
    with served.client() as client, served.client() as other:
        mine = other.generate([5])
        admit = served.peers.expect(messages.Admit)
        for _ in range(QUEUE_MAX):
            client.generate([6])
        assert client.status()["queue"]["waiting"] == QUEUE_MAX
        client.close()
        time.sleep(0.3)  # until the gateway's socket has seen the end
        last = other.generate([7])
        assert other.status()["queue"]["waiting"] == 1
        served.peers.done(admit.request)
        assert list(mine) == []
        served.peers.done(served.peers.expect(messages.Admit).request)
        assert list(last) == []


def test_requests_wait_until_all_are_ready(starting: Served) -> None:
    with starting.client() as client:
        report = client.status()
        assert report["state"] == "starting"
        assert report["services"]["reader"]["state"] == "starting"
        generation = client.generate([5])
        starting.peers.nothing_more()
        starting.peers.start()
        starting.peers.done(starting.peers.expect(messages.Admit).request)
        assert list(generation) == []


def test_a_failure_of_compute_names_its_service_and_the_next_request_runs(served: Served) -> None:
    with served.client() as client:
        generation = client.generate([5])
        request = served.peers.expect(messages.Admit).request
        served.peers.done(request, "failed", "layer 1 neuron 17: bad checksum")
        with pytest.raises(inflash.RequestFailed) as failure:
            list(generation)
        assert failure.value.service == "reader"
        assert not isinstance(failure.value, inflash.RequestRefused)
        generation = client.generate([5])
        served.peers.done(served.peers.expect(messages.Admit).request)
        assert list(generation) == []


def assert_lost(served: Served, service: str, reason: str, cause: Any) -> None:
    """After `cause`, running and waiting requests fail in time and the gateway ends with 1."""
    with served.client() as client:
        generations = [client.generate([5]) for _ in range(2)]
        assert client.status()["queue"]["waiting"] == 1
        served.peers.expect(messages.Admit)
        begun = time.monotonic()
        cause()
        for generation in generations:
            with pytest.raises(inflash.RequestFailed, match=reason) as failure:
                list(generation)
            assert failure.value.service == service
        assert time.monotonic() - begun < LOST_S
    assert served.process.wait(PATIENCE_S) == 1
    assert served.process.stderr is not None
    assert f"{service}: " in served.process.stderr.read()


def test_a_silent_service_is_lost(served: Served) -> None:
    assert_lost(served, "predictor", "silent for", lambda: served.peers.silent.add("predictor"))


@pytest.mark.parametrize("fault", ["", "the disk burns"])
def test_a_dead_reader_is_lost_and_cleared_away(starting: Served, fault: str) -> None:
    sleeper = subprocess.Popen(["sleep", "100"])
    peers = starting.peers
    peers.pids["reader"] = sleeper.pid
    peers.start()
    starting.until("ready")
    left = [starting.run_dir / "fetch.ipc", starting.run_dir / "release.ipc"]
    left.append(segment_path(starting.run_dir))
    for path in left:
        path.touch()

    def die() -> None:
        if fault:
            peers.fault("reader", fault)
        sleeper.kill()  # not waited for: a zombie is dead too

    assert_lost(starting, "reader", fault or f"process {sleeper.pid} has ended", die)
    sleeper.wait()
    assert not [path for path in left if path.exists()]


def test_a_fault_alone_ends_nothing(served: Served) -> None:
    served.peers.fault("reader", "made up")
    with served.client() as client:
        generation = client.generate([5])
        served.peers.done(served.peers.expect(messages.Admit).request)
        assert list(generation) == []


def test_a_stop_fails_what_is_under_way(served: Served) -> None:
    with served.client() as client:
        generations = [client.generate([5]) for _ in range(2)]
        assert client.status()["queue"]["waiting"] == 1
        served.peers.expect(messages.Admit)
        served.process.terminate()
        for generation in generations:
            with pytest.raises(inflash.RequestFailed, match="the server is stopping") as failure:
                list(generation)
            assert type(failure.value) is inflash.RequestFailed
    assert served.process.wait(PATIENCE_S) == 0
    assert not (served.run_dir / f"{CLIENT_LINK}.ipc").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_gateway_is_told_in_time(served: Served, number: signal.Signals) -> None:
    async def wait_async() -> None:
        async with inflash.AsyncClient(served.run_dir) as client:
            generation = await client.generate([6])
            async for _ in generation:
                pass

    with served.client() as client:
        generation = client.generate([5])
        served.peers.expect(messages.Admit)
        seen: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(wait_async())
            except inflash.InflashError as error:
                seen.append(error)

        waiter = threading.Thread(target=run)
        waiter.start()
        time.sleep(1.0)
        served.process.send_signal(number)
        begun = time.monotonic()
        with pytest.raises(inflash.ServerLost) as failure:
            list(generation)
        assert failure.value.service == "gateway"
        waiter.join(LOST_S)
        assert isinstance(seen[0], inflash.ServerLost)
        assert time.monotonic() - begun < LOST_S
        with pytest.raises(inflash.ServerNotFound):
            client.status()


def test_bad_messages_are_counted_and_dropped(served: Served) -> None:
    rng = random.Random(1)
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket, served.client() as client:
        socket.connect(endpoint(served.run_dir, CLIENT_LINK))
        generation = client.generate([5])
        admit = served.peers.expect(messages.Admit)
        for _ in range(300):
            socket.send_multipart([rng.randbytes(rng.randrange(50)) for _ in range(3)])
        socket.send(bytes(wire.CLIENT_MESSAGE_BYTES_MAX + 1))
        socket.send(b"\x93\x02\xa6Cancel\x01")
        served.peers.answers.socket.send(b"nonsense")
        served.peers.token(12345)
        assert served.peers.expect(messages.Abort).request == 12345
        served.peers.done(admit.request)
        assert list(generation) == []
        deadline = time.monotonic() + PATIENCE_S
        while client.status()["counters"]["bad_messages"] < 304:
            assert time.monotonic() < deadline, client.status()["counters"]
    context.term()


def test_a_bad_sampling_of_another_client_is_refused_by_its_number(served: Served) -> None:
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint(served.run_dir, CLIENT_LINK))
        sampling = b"\x99\x00\xca\x00\x00\x00\x00\x00\x01\x01\xc0\x90\xc2\x90"
        header = b"\x97\x01\xa8Generate\x07\xa1a" + sampling + b"\xc2\xc0"
        socket.send(header)
        assert socket.poll(5000)
        failed = wire.CLIENT_CODEC.decode(socket.recv_multipart())
        assert (failed.request, failed.refused) == (7, True)
        assert "max_new_tokens=0" in failed.reason
    context.term()


def test_no_server_is_told_at_once_and_a_stale_socket_soon(run_dir: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(inflash.ServerNotFound, match="inflash serve STORE") as error:
        inflash.Client(run_dir)
    assert str(run_dir) in str(error.value)
    assert time.monotonic() - begun < 0.5
    context = zmq.Context()
    stale = context.socket(zmq.DEALER)  # bound, and answers nothing
    stale.bind(endpoint(run_dir, CLIENT_LINK))
    with pytest.raises(inflash.ServerNotFound):
        inflash.Client(run_dir)

    async def ask() -> None:
        async with inflash.AsyncClient(run_dir):
            pass

    with pytest.raises(inflash.ServerNotFound):
        asyncio.run(ask())
    assert time.monotonic() - begun < 6.0
    stale.close()
    context.term()
    (run_dir / f"{CLIENT_LINK}.ipc").unlink(missing_ok=True)
