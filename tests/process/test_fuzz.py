"""1,000 random and mutated messages to each socket: nothing dies, the next request succeeds."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import zmq

from common import messages
from common.limits import MESSAGE_BYTES_MAX
from common.links import LINKS
from inflash import Client
from inflash._messages import (
    CLIENT_CODEC,
    CLIENT_MESSAGE_BYTES_MAX,
    Cancel,
    Failed,
    Generate,
    Sampling,
    Stats,
    Status,
)
from inflash._rundir import endpoint
from tests.conftest import Made, serving

COUNT = 1000
IDS = b"\1\0\0\0\2\0\0\0\5\0\0\0"
STATS = Stats(**dict.fromkeys(Stats.__annotations__, 1))
# One well-formed message of each kind, to mutate.
SEEDS: dict[str, list[Any]] = {
    "clients": [Generate(1, "def ", Sampling(max_new_tokens=4), False), Cancel(1), Status(1)],
    "health": [
        messages.Ready("reader", 1, 1, "abc"),
        messages.Health("reader", 1, 1.0, 5, {"reads": 1}),
        messages.Fault("reader", 1, "made up"),
    ],
    "control": [messages.Admit(7, Sampling(max_new_tokens=4), False, IDS), messages.Abort(7)],
    "answers": [
        messages.Prefilling(7, 0, 9, 9, 1, 2, 0.5),
        messages.Token(7, 1, 5, -1.0, b""),
        messages.Done(7, "length", "", "", STATS),
    ],
    "predict": [
        messages.Predict((7,), (0,), 1, 0, False, True, b"\0" * 256),
        messages.Predict((7,), (0,), 1, -1, True, True, b"\0" * 256),
    ],
    "fetch": [messages.Fetch(7, 1, 0, False, 1, IDS), messages.Fetch(7, 1, 1, True, 1, IDS)],
    "resident": [
        messages.Resident(7, 1, 0, 0, 0, True, 0, 0, 0, 0, 0, 0, 1, 1, 1, IDS, IDS),
        messages.Unreadable(7, 1, 0, "made up"),
        messages.Cache("/dev/null", 10, 4096),
    ],
    "release": [messages.Release(1, 0, 0), messages.Drop(1), messages.Attached(1)],
}


def frames_of(seed: Any) -> list[bytes]:
    codec = CLIENT_CODEC if isinstance(seed, Generate | Cancel | Status | Failed) else None
    for spec in LINKS.values():
        if codec is None and seed in SEEDS[spec.name]:
            codec = spec.codec
    assert codec is not None
    return [bytes(frame) for frame in codec.encode(seed)]


def bad_message(rng: random.Random, link: str, number: int) -> list[bytes]:
    """Random bytes, an oversized message, or a well-formed one with some bytes changed."""
    if number % 400 == 0:
        return [bytes(max(MESSAGE_BYTES_MAX, CLIENT_MESSAGE_BYTES_MAX) + 1)]
    if number % 3 == 0:
        return [rng.randbytes(rng.randrange(0, 80)) for _ in range(rng.randrange(1, 4))]
    frames = frames_of(rng.choice(SEEDS[link]))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(frames))
        frame = bytearray(frames[at])
        action = rng.randrange(4)
        if action == 0 and frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        elif action == 1:
            frame = frame[: rng.randrange(len(frame) + 1)]
        elif action == 2:
            frame += rng.randbytes(rng.randrange(1, 9))
        else:
            frames.append(rng.randbytes(3))
        frames[at] = bytes(frame)
    return frames


@pytest.mark.timeout(180)
def test_bad_messages_are_counted_and_dropped(made: Made, run_dir: Path) -> None:
    rng = random.Random(3)
    with serving(made.store("opt"), run_dir, cache="10%") as client:
        expected = answer(client)
        before = {name: entry["pid"] for name, entry in client.status()["services"].items()}
        for link in SEEDS:
            send_all(run_dir, link, [bad_message(rng, link, n) for n in range(COUNT)])
            assert answer(client) == expected, f"after {link}"
        deadline = time.monotonic() + 30  # counters travel with the heartbeat
        while True:
            report = client.status()
            bad = {n: e["counters"].get("bad_messages", 0) for n, e in report["services"].items()}
            if all(count >= COUNT // 3 for count in bad.values()):
                break
            assert time.monotonic() < deadline, bad
            time.sleep(0.2)
        assert {n: entry["pid"] for n, entry in report["services"].items()} == before
        assert report["state"] == "ready"


def answer(client: Client) -> list[int]:
    return [t.id for t in client.generate([5, 6, 7], max_new_tokens=5, ignore_eos=True)]


def send_all(run_dir: Path, link: str, batch: list[list[bytes]]) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER if link == "clients" else zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 10_000)
    socket.setsockopt(zmq.SNDTIMEO, 10_000)
    socket.connect(endpoint(run_dir, link))
    for frames in batch:
        socket.send_multipart(frames)
    socket.close()
    context.term()  # returns when all is sent
