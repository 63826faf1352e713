"""Chooses how bundles are read: by making a real read of the store each way, best way first."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import StoreError, UserError
from common.limits import PROBE_S
from services.reader.aio import Aio
from services.reader.backends import RECHECK_S, Backend, Memory
from services.reader.reads import plan_reads
from services.reader.threads import Threads


@dataclass(frozen=True)
class Choice:
    """The backend to use, and why, as a sentence."""

    backend: Backend
    reason: str


_SAID = {
    "aio": "bundles are read directly and asynchronously (io_submit)",
    "threads, direct": "bundles are read directly by threads (preadv)",
    "threads, through the page cache": "bundles are read by threads, through the page cache",
}


def choose_backend(setting: str, paths: Sequence[Path], memory: Memory) -> Choice:
    """Opens the bundle files `paths` the best way that works; uses slot 0 of `memory`.

    `setting` is auto, aio or threads. `UserError` if the way that it demands does not work,
    `StoreError` if none does. The caller closes the backend.
    """
    ways: dict[str, Callable[[], Backend]] = {
        "aio": partial(Aio, paths, memory),
        "threads, direct": partial(Threads, paths, memory, direct=True),
        "threads, through the page cache": partial(Threads, paths, memory, direct=False),
    }
    expected = _read_buffered(paths[0], memory.shape[1])
    refused: list[str] = []
    for way, make in ways.items():
        if setting not in ("auto", way.split(",")[0]):
            continue
        try:
            backend = _proven(make, memory, expected)
        except OSError as error:
            refused.append(f"{way}: {error.strerror or error}")
            continue
        because = f"; refused were {'; '.join(refused)}" if refused else ""
        return Choice(backend, f"{_SAID[way]}: a probe read bundle 0 right{because}")
    if setting != "auto":
        raise UserError(
            f"INFLASH_BACKEND: {setting} cannot read {paths[0]} ({'; '.join(refused)});"
            " INFLASH_BACKEND=auto takes a way that works"
        )
    raise StoreError(f"no way of reading {paths[0]} works: {'; '.join(refused)}")


def _read_buffered(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(size)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    if len(head) < size:
        raise StoreError(f"{path} is cut off: it holds less than one bundle; run inflash verify")
    return head


def _proven(make: Callable[[], Backend], memory: Memory, expected: bytes) -> Backend:
    """A backend that has read bundle 0 as `expected`; `OSError` says why there is none."""
    backend = make()
    try:
        memory[0] = 0
        first = np.zeros(1, np.int64)
        backend.submit(0, 0, plan_reads(first, first, memory.shape[1]))
        error = _wait(backend)
        if not error and memory[0].tobytes() != expected:
            error = "bundle 0 came wrong"
        if error:
            raise OSError(error)
    except BaseException:
        backend.close()
        raise
    return backend


def _wait(backend: Backend) -> str:
    """The error of the one batch under way, "" if it went well."""
    deadline = time.monotonic() + PROBE_S
    while (rest := deadline - time.monotonic()) > 0:
        select.select([backend.fileno()], [], [], min(rest, RECHECK_S))
        for completion in backend.completed():
            return completion.error
    return f"bundle 0 did not come within {PROBE_S:.0f} s (limit PROBE_S)"
