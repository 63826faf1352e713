"""Reads in threads: os.preadv, wherever Python runs. The page cache is passed by where it can be.

Each thread takes a slice of a batch; preadv lets go of the interpreter, so as many reads are under
way as there are threads. Completions come through a pipe, so that the loop polls it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from services.reader.backends import (
    Completion,
    Memory,
    close_files,
    forget_pages,
    open_files,
    short_read,
)
from services.reader.reads import Reads

THREADS = 16  # 16 KiB reads of a virtio drive: 0.7 GB/s with 8, 0.95 with 16, no more with 32


class _Batch:
    """Reads given by one submit; `left` slices of it are not over."""

    def __init__(self, tag: int, file: int, reads: Reads, slices: int) -> None:
        self.tag = tag
        self.file = file
        self.reads = reads
        self.left = slices
        self.failed = -1
        self.error = ""

    def fail(self, read: int, error: str) -> None:
        if not self.error or read < self.failed:
            self.failed, self.error = read, error


class Threads:
    """The portable backend; see `Backend`. `OSError` if the files cannot be opened so."""

    name = "threads"

    def __init__(self, paths: Sequence[Path], memory: Memory, *, direct: bool) -> None:
        # macOS has no O_DIRECT; F_NOCACHE on an open file does what it is for.
        self.direct = direct
        self._files = open_files(paths, direct=direct and sys.platform != "darwin")
        if direct and sys.platform == "darwin":
            _pass_cache_by(self._files)
        self._view = memory.data.cast("B")
        self._work: queue.SimpleQueue[tuple[_Batch, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over: list[_Batch] = []
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"read-{i}", daemon=True)
            for i in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def fileno(self) -> int:
        return self._wake_read

    def submit(self, tag: int, file: int, reads: Reads) -> None:
        if self._closed:
            raise ValueError("the backend is closed")
        slices = min(THREADS, len(reads))
        batch = _Batch(tag, self._files[file], reads, slices)
        cuts = [len(reads) * i // slices for i in range(slices + 1)]
        for first, end in itertools.pairwise(cuts):
            self._work.put((batch, first, end))

    def completed(self) -> list[Completion]:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        with self._lock:
            over, self._over = self._over, []
        return [Completion(b.tag, b.error, b.failed) for b in over]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True  # threads stop at their next read; the one under way is waited for
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._view.release()
        close_files([*self._files, self._wake_read, self._wake_write])

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            batch, first, end = work
            failure = self._read_slice(batch, first, end)
            with self._lock:
                if failure:
                    batch.fail(*failure)
                batch.left -= 1
                if batch.left:
                    continue
                self._over.append(batch)
            with contextlib.suppress(BlockingIOError):  # a full pipe is readable already
                os.write(self._wake_write, b"\0")

    def _read_slice(self, batch: _Batch, first: int, end: int) -> tuple[int, str] | None:
        """Makes reads `first` to `end`; the first that failed and why, or None."""
        reads, stride = batch.reads, batch.reads.stride_bytes
        failure = None
        for read in range(first, end):
            if self._closed:
                return read, "the backend was closed"
            slots = reads.slots[reads.firsts[read] : reads.firsts[read + 1]].tolist()
            buffers = [self._view[slot * stride : (slot + 1) * stride] for slot in slots]
            offset = int(reads.offsets[read])
            error = _read(batch.file, buffers, offset)
            if not self.direct:
                forget_pages(batch.file, offset, len(buffers) * stride)
            if error and not failure:
                failure = read, error
        return failure


def _read(file: int, buffers: list[memoryview], offset: int) -> str:
    expected = sum(map(len, buffers))
    try:
        got = os.preadv(file, buffers, offset)
    except OSError as error:
        return error.strerror or str(error)
    return "" if got == expected else short_read(got, expected)


def _pass_cache_by(files: Sequence[int]) -> None:
    import fcntl

    for file in files:
        fcntl.fcntl(file, getattr(fcntl, "F_NOCACHE"), 1)  # noqa: B009 - only macOS has it
