"""What every way of reading bundles must do. Real files, real reads."""

from __future__ import annotations

import mmap
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import StoreError, UserError
from services.reader.aio import Aio
from services.reader.backends import RECHECK_S, Backend, Completion, Memory
from services.reader.probe import choose_backend
from services.reader.reads import Reads, plan_reads
from services.reader.threads import Threads

pytestmark = pytest.mark.timeout(30)

STRIDE = 4096
NEURONS = 2000
SLOTS = 2100
WAYS: dict[str, Callable[[list[Path], Memory], Backend]] = {
    "aio": Aio,
    "aio-depth-3": lambda paths, memory: Aio(paths, memory, depth=3),
    "threads-direct": lambda paths, memory: Threads(paths, memory, direct=True),
    "threads-buffered": lambda paths, memory: Threads(paths, memory, direct=False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], np.ndarray]:
    """Two bundle files and their bytes, [files, neurons, stride]."""
    content = np.random.default_rng(0).integers(0, 256, (2, NEURONS, STRIDE), np.uint8)
    folder = tmp_path_factory.mktemp("layers")
    paths = [folder / f"{layer:03}.bundles" for layer in range(2)]
    for path, data in zip(paths, content, strict=True):
        path.write_bytes(data.tobytes())
    return paths, content


@pytest.fixture
def memory() -> Memory:
    region = mmap.mmap(-1, SLOTS * STRIDE)
    return np.frombuffer(region, np.uint8).reshape(SLOTS, STRIDE)


@pytest.fixture(params=WAYS)
def backend(
    request: pytest.FixtureRequest, files: tuple[list[Path], np.ndarray], memory: Memory
) -> Iterator[Backend]:
    backend = WAYS[request.param](files[0], memory)
    yield backend
    backend.close()


def wait(backend: Backend, batches: int, deadline_s: float = 10.0) -> dict[int, Completion]:
    """The completions of that many batches, by tag."""
    deadline = time.monotonic() + deadline_s
    over: dict[int, Completion] = {}
    while len(over) < batches:
        rest = deadline - time.monotonic()
        assert rest > 0, f"{len(over)} of {batches} batches within {deadline_s} s"
        select.select([backend.fileno()], [], [], min(rest, RECHECK_S))
        for completion in backend.completed():
            assert completion.tag not in over
            over[completion.tag] = completion
    return over


def reads(ids: list[int] | np.ndarray, slots: list[int] | np.ndarray) -> Reads:
    return plan_reads(np.array(ids, np.int64), np.array(slots, np.int64), STRIDE)


def test_a_bundle_lands_in_its_slot_and_nowhere_else(backend, files, memory):
    backend.submit(7, 1, reads([5], [3]))
    assert wait(backend, 1) == {7: Completion(7, "", -1)}
    assert (memory[3] == files[1][1, 5]).all()
    assert not memory[:3].any()
    assert not memory[4:].any()


def test_neighbours_are_one_read_into_scattered_slots(backend, files, memory):
    ids, slots = [10, 11, 12, 13, 20], [9, 2, 30, 3, 1]
    planned = reads(ids, slots)
    assert len(planned) == 2
    backend.submit(1, 0, planned)
    assert not wait(backend, 1)[1].error
    assert (memory[slots] == files[1][0, ids]).all()


def test_more_reads_than_the_queue_holds(backend, files, memory):
    rng = np.random.default_rng(1)
    ids = np.arange(0, NEURONS, 2)  # no two are neighbours
    slots = rng.permutation(SLOTS)[: len(ids)]
    planned = reads(ids, slots)
    assert len(planned) == 1000
    backend.submit(1, 0, planned)
    assert not wait(backend, 1)[1].error
    assert (memory[slots] == files[1][0, ids]).all()


def test_many_batches_of_two_files_at_once(backend, files, memory):
    slots = np.random.default_rng(2).permutation(SLOTS)[:NEURONS].reshape(50, 40)
    ids = np.sort(np.random.default_rng(3).permutation(NEURONS).reshape(50, 40))
    for tag in range(50):
        backend.submit(tag, tag % 2, reads(ids[tag], slots[tag]))
    over = wait(backend, 50)
    assert {c.error for c in over.values()} == {""}
    for tag in range(50):
        assert (memory[slots[tag]] == files[1][tag % 2, ids[tag]]).all()


def test_a_whole_layer_in_large_reads(backend, files, memory):
    planned = reads(np.arange(NEURONS), np.arange(NEURONS)[::-1].copy())
    assert len(planned) == -(-NEURONS // 256)
    backend.submit(1, 1, planned)
    assert not wait(backend, 1)[1].error
    assert (memory[:NEURONS] == files[1][1, ::-1]).all()


def test_a_read_past_the_end_is_an_error_that_names_it(backend, files, memory):
    backend.submit(1, 0, reads([0, 2, NEURONS + 5], [0, 1, 2]))
    backend.submit(2, 0, reads([7], [3]))
    over = wait(backend, 2)
    assert (over[1].failed, over[1].error) == (2, "short read: 0 of 4,096 bytes")
    assert over[2].error == "", "the next batch is not touched by it"
    assert (memory[[0, 1, 3]] == files[1][0, [0, 2, 7]]).all()


def test_a_read_that_ends_early_is_an_error(backend):
    backend.submit(1, 0, reads([NEURONS - 2, NEURONS - 1, NEURONS], [0, 1, 2]))
    assert wait(backend, 1)[1].error == "short read: 8,192 of 12,288 bytes"


def test_a_read_that_the_kernel_refuses_is_an_error(backend, files, memory):
    planned = reads([1, 3, 5], [0, 1, 2])
    planned.offsets[1] = -STRIDE
    backend.submit(1, 0, planned)
    completion = wait(backend, 1)[1]
    assert completion.failed == 1
    assert "Invalid argument" in completion.error
    assert (memory[[0, 2]] == files[1][0, [1, 5]]).all(), "the others are made all the same"


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_truncated_after_it_was_opened(way, tmp_path, memory):
    path = tmp_path / "000.bundles"
    path.write_bytes(bytes(10 * STRIDE))
    backend = WAYS[way]([path], memory)
    with path.open("r+b") as file:
        file.truncate(5 * STRIDE)
    backend.submit(1, 0, reads([1, 7], [0, 1]))
    completion = wait(backend, 1)[1]
    backend.close()
    assert (completion.failed, completion.error) == (1, "short read: 0 of 4,096 bytes")


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_not_there(way, tmp_path, memory):
    with pytest.raises(FileNotFoundError):
        WAYS[way]([tmp_path / "none"], memory)


def test_nothing_to_say_without_reads(backend):
    assert backend.completed() == []
    assert select.select([backend.fileno()], [], [], 0)[0] == []


def test_closed_takes_no_reads_and_closes_again(backend):
    backend.close()
    with pytest.raises(ValueError, match="closed"):
        backend.submit(1, 0, reads([0], [0]))
    backend.close()


@pytest.mark.parametrize("way", WAYS)
def test_close_waits_for_what_is_under_way(way, files):
    for repeat in range(10):
        region = mmap.mmap(-1, SLOTS * STRIDE)
        memory = np.frombuffer(region, np.uint8).reshape(SLOTS, STRIDE)
        backend = WAYS[way](files[0], memory)
        for tag in range(5):
            backend.submit(tag, tag % 2, reads(np.arange(0, NEURONS, 2), np.arange(1000)))
        time.sleep(repeat / 2000)
        backend.close()
        before = memory.copy()
        time.sleep(0.005)
        assert (memory == before).all(), "a read was still writing"
        del memory, backend
        region.close()  # raises if anything still points into it


def test_the_probe_takes_the_best_way_and_says_so(files, memory):
    choice = choose_backend("auto", files[0], memory)
    choice.backend.close()
    assert (choice.backend.name, choice.backend.direct) == ("aio", True)
    assert choice.reason.endswith("(io_submit): a probe read bundle 0 right")


def test_the_probe_takes_what_it_is_told(files, memory):
    choice = choose_backend("threads", files[0], memory)
    choice.backend.close()
    assert (choice.backend.name, choice.backend.direct) == ("threads", True)


@pytest.mark.parametrize("setting", ["auto", "aio", "threads"])
def test_the_probe_refuses_a_file_without_a_bundle(setting, tmp_path, memory):
    path = tmp_path / "000.bundles"
    path.write_bytes(bytes(STRIDE - 1))
    with pytest.raises(StoreError, match="less than one bundle"):
        choose_backend(setting, [path], memory)


def test_the_probe_refuses_a_way_that_brings_other_bytes(files, memory, monkeypatch):
    monkeypatch.setattr("services.reader.probe._read_buffered", lambda path, size: b"\1" * size)
    with pytest.raises(UserError, match=r"aio cannot read .*bundle 0 came wrong"):
        choose_backend("aio", files[0], memory)
