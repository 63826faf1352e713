"""Asynchronous direct reads of Linux: io_submit and io_getevents through ctypes.

A batch's control blocks are one numpy array; a read costs no Python object. At most `depth` reads
are with the kernel, the others wait here. Completions raise an eventfd, so that the loop polls it
beside its sockets.

    control block (struct iocb, include/uapi/linux/aio_abi.h)     event (struct io_event)
    data u64 · key u32 · rw_flags u32 · opcode u16 ·              data u64 · obj u64 ·
    priority i16 · file u32 · buffer u64 · bytes u64 ·            res i64 · res2 i64
    offset i64 · reserved u64 · flags u32 · resfd u32

`data` is the batch's number above the read's own in it. The kernel copies control blocks and iovecs
during io_submit, so both are ours again when it returns.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.limits import READS_IN_FLIGHT_MAX
from services.reader.backends import Completion, Memory, close_files, open_files, short_read
from services.reader.reads import Reads

_CALLS = {  # setup, destroy, getevents, submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
}
_PREADV = 7  # IOCB_CMD_PREADV
_RESFD = 1  # IOCB_FLAG_RESFD
_READ_BITS = 32  # of a read's number in `data`
WAKE_EVERY = 64  # reads of a batch: so many complete for one signal of the eventfd

_CONTROL = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("file", "<u4"),
        ("buffer", "<u8"),
        ("bytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("resfd", "<u4"),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("obj", "<u8"), ("res", "<i8"), ("res2", "<i8")])
_IOVEC = np.dtype([("base", "<u8"), ("bytes", "<u8")])
assert (_CONTROL.itemsize, _EVENT.itemsize, _IOVEC.itemsize) == (64, 32, 16)


class _Batch:
    """Reads given by one submit. `begun` of them were given to the kernel, `left` are not over."""

    def __init__(
        self, number: int, tag: int, file: int, reads: Reads, memory: int, eventfd: int
    ) -> None:
        """`memory` is the address of the slots."""
        self.number = number
        self.tag = tag
        self.lengths = reads.lengths
        self.begun = 0
        self.left = len(reads)
        self.failed = -1
        self.error = ""
        self._vectors = np.empty(len(reads.slots), _IOVEC)
        self._vectors["base"] = memory + reads.slots * reads.stride_bytes
        self._vectors["bytes"] = reads.stride_bytes
        index = np.arange(len(reads))
        self._blocks = np.zeros(len(reads), _CONTROL)
        self._blocks["data"] = (number << _READ_BITS) + index
        # Few completions wake the loop: a turn of it costs more than a read. Counted from the end,
        # so that the last of a batch does; what it leaves behind is asked for by the clock.
        self._blocks["flags"] = index[::-1] % WAKE_EVERY == 0
        self._blocks["opcode"] = _PREADV
        self._blocks["file"] = file
        self._blocks["buffer"] = self._vectors.ctypes.data + reads.firsts[:-1] * _IOVEC.itemsize
        self._blocks["bytes"] = np.diff(reads.firsts)
        self._blocks["offset"] = reads.offsets
        self._blocks["resfd"] = eventfd
        self._pointers = self._blocks.ctypes.data + index * _CONTROL.itemsize
        self._pointers_at = self._pointers.ctypes.data

    @property
    def pointers(self) -> ctypes.c_void_p:
        """The addresses of the control blocks that are not begun, one after another."""
        return ctypes.c_void_p(self._pointers_at + self.begun * self._pointers.itemsize)

    @property
    def waiting(self) -> int:
        """Reads that are not begun."""
        return len(self.lengths) - self.begun

    def fail(self, read: int, error: str) -> None:
        if not self.error or read < self.failed:
            self.failed, self.error = read, error


class Aio:
    """The backend over Linux AIO; see `Backend`. `OSError` if this system has none."""

    name = "aio"
    direct = True

    def __init__(
        self, paths: Sequence[Path], memory: Memory, depth: int = READS_IN_FLIGHT_MAX
    ) -> None:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in _CALLS:
            raise OSError(f"io_submit is not known on {sys.platform} {machine}")
        self._setup, self._destroy, self._getevents, self._submit = _CALLS[machine]
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._memory = memory  # keeps it mapped
        self._memory_at = memory.ctypes.data
        self._files = open_files(paths, direct=True)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = ctypes.c_ulong(0)
        if self._call(self._setup, ctypes.c_long(depth), ctypes.byref(self._context)) < 0:
            close_files([*self._files, self._eventfd])
            raise _os_error("io_setup")
        self._queued: collections.deque[_Batch] = collections.deque()  # not all begun
        self._running: dict[int, _Batch] = {}  # not over
        self._submitted = 0
        self._closed = False
        self._depth = depth
        self._in_flight = 0  # with the kernel
        self._events = np.zeros(depth, _EVENT)
        self._events_at = ctypes.c_void_p(self._events.ctypes.data)
        self._no_time = (ctypes.c_long * 2)(0, 0)

    def fileno(self) -> int:
        return self._eventfd

    def submit(self, tag: int, file: int, reads: Reads) -> None:
        if self._closed:
            raise ValueError("the backend is closed")
        self._submitted += 1
        number, at = self._submitted, self._memory_at
        batch = _Batch(number, tag, self._files[file], reads, at, self._eventfd)
        self._running[batch.number] = batch
        self._queued.append(batch)
        self._fill()

    def completed(self) -> list[Completion]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        self._reap(0)
        self._fill()
        over = [b for b in self._running.values() if not b.left]
        for batch in over:
            del self._running[batch.number]
        return [Completion(b.tag, b.error, b.failed) for b in over]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queued.clear()
        self._call(self._destroy, self._context)  # waits until no read is under way
        close_files([*self._files, self._eventfd])

    def _fill(self) -> None:
        """Gives the kernel what is queued, as far as it may have more."""
        while self._queued and self._in_flight < self._depth:
            batch = self._queued[0]
            count = min(self._depth - self._in_flight, batch.waiting)
            done = self._call(self._submit, self._context, ctypes.c_long(count), batch.pointers)
            if done < 0 and not self._refused(batch):
                return
            begun = max(int(done), 0)
            self._in_flight += begun
            batch.begun += begun
            if not batch.waiting:
                self._queued.popleft()

    def _refused(self, batch: _Batch) -> bool:
        """The kernel did not take the batch's next read: it failed, unless the kernel is only
        busy with others of ours. True if the next can be tried."""
        code = ctypes.get_errno()
        if code == errno.EINTR:
            return True
        if code == errno.EAGAIN and self._in_flight:
            return False  # the completion of those raises the eventfd, and we try again
        batch.fail(batch.begun, f"io_submit: {os.strerror(code)}")
        batch.begun += 1
        batch.left -= 1
        os.eventfd_write(self._eventfd, 1)  # nothing in the kernel will
        return True

    def _reap(self, at_least: int) -> None:
        """Takes the kernel's events: frees their control blocks, finds short reads and errors."""
        count = self._call(
            self._getevents,
            self._context,
            ctypes.c_long(at_least),
            ctypes.c_long(len(self._events)),
            self._events_at,
            ctypes.byref(self._no_time),
        )
        if count < 0:
            if ctypes.get_errno() == errno.EINTR:
                return
            raise _os_error("io_getevents")
        self._in_flight -= count
        events = self._events[:count]
        data = events["data"].astype(np.int64)
        numbers, reads = data >> _READ_BITS, data & ((1 << _READ_BITS) - 1)
        for batch in self._running.values():
            mine = numbers == batch.number
            if taken := int(np.count_nonzero(mine)):
                batch.left -= taken
                self._check(batch, reads[mine], events["res"][mine])

    def _check(
        self, batch: _Batch, reads: npt.NDArray[np.int64], results: npt.NDArray[np.int64]
    ) -> None:
        lengths = batch.lengths[reads]
        for i in np.flatnonzero(results != lengths).tolist():
            result = int(results[i])
            error = os.strerror(-result) if result < 0 else short_read(result, int(lengths[i]))
            batch.fail(int(reads[i]), error)


def _os_error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
