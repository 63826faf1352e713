"""The cache's bytes: one region of shared memory, made by the reader, mapped by compute.

    /dev/shm/inflash-<user>-<hash of the run directory>     mode 0600

    byte 0                                                        slots × stride_bytes
    ├── slot 0 ──┬── slot 1 ──┬── ... layer 0's ──┬── layer 1's ──┤
       one bundle and the padding that the store gives it, as they lie in the bundle file

The reader is the only writer. Nothing here says what a slot holds: `Resident` does, and a slot may
be read only from its `Resident` to its `Release`. Python has no memory fences, so no flag in this
region synchronises anything.

Slots that are out of use give their pages back to the system, and take new ones when they return.

Pages are of 2 MB where the kernel can collapse small ones (Linux 6.1): rows that lie anywhere in
the region were multiplied in four fifths of the time (docs/measurements.md). What cannot be
collapsed, and what is given back and taken again, has pages of the usual size.

Not `multiprocessing.shared_memory`: on Python 3.11 the exit of a process that attached unlinks it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError

SHM = Path("/dev/shm")
Region = Any
"""A mapping: a buffer of bytes, for numpy.frombuffer. It lasts as long as someone has it."""

LARGE = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE
_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1  # MAP_FAILED
_FIXED, _NO_RESERVE = 0x10, 0x4000  # of Linux's mmap, as are the others that Python has names for


def segment_path(run_dir: Path) -> Path:
    """Where the cache of the server in `run_dir` lies: one name, so that a crash is cleaned up."""
    digest = hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:12]
    base = SHM if SHM.is_dir() else run_dir
    return base / f"inflash-{os.getuid()}-{digest}"


@contextlib.contextmanager
def create_segment(path: Path, size_bytes: int) -> Iterator[Region]:
    """Makes and maps the region; unlinks it at the end. `UserError` if memory is short.

    The pages are allocated here: running out of memory is an error now, not a SIGBUS later.
    """
    path.unlink(missing_ok=True)  # a server that was killed left it; the caller holds the claim
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield _allocated(fd, path, size_bytes)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _allocated(fd: int, path: Path, size_bytes: int) -> Region:
    try:
        os.ftruncate(fd, size_bytes)
        region = _map(fd, size_bytes)
        _collapse(fd, region)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        stat = os.statvfs(path.parent)
        raise UserError(
            f"the cache of {size_bytes:,} bytes does not fit in {path.parent}"
            f" ({stat.f_bavail * stat.f_frsize:,} bytes free: {error.strerror});"
            " choose a smaller --memory or --cache"
        ) from None
    return region


def _map(fd: int, size_bytes: int) -> Region:
    """Maps a file, on Linux from a multiple of LARGE on, where its large pages can be."""
    if sys.platform != "linux":
        return mmap.mmap(fd, size_bytes)
    none, private = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    reserved = _call(_libc().mmap, None, size_bytes + LARGE, none, private, -1, 0)
    begin, both = -(-reserved // LARGE) * LARGE, mmap.PROT_READ | mmap.PROT_WRITE
    _call(_libc().mmap, begin, size_bytes, both, mmap.MAP_SHARED | _FIXED, fd, 0)
    region = (ctypes.c_ubyte * size_bytes).from_address(begin)
    # When nobody has it any more; not at the exit, when threads may still read it.
    weakref.finalize(region, _libc().munmap, reserved, size_bytes + LARGE).atexit = False
    return region


def _collapse(fd: int, region: Region) -> None:
    """Makes large pages while there is next to nothing in them: of pages that are all there it
    takes 25 times as long, since they are copied."""
    if sys.platform != "linux":
        return
    for offset in range(0, len(region) - LARGE + 1, LARGE):
        os.posix_fallocate(fd, offset, mmap.PAGESIZE)  # one has to be there
        try:
            _advise(region, _COLLAPSE, offset, LARGE)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY):  # an older kernel, or no page left
                return


def _advise(region: Region, advice: int, offset: int, length: int) -> None:
    _call(_libc().madvise, ctypes.addressof(region) + offset, length, advice)


def _call(function: Any, *arguments: Any) -> int:
    if (result := function(*arguments)) in (-1, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, integer = ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, size, integer, integer, integer, ctypes.c_int64)
    libc.madvise.argtypes = (ctypes.c_void_p, size, integer)
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    return libc


def large_pages(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory of our own, uint8 [size_bytes], all 0, from where a page begins: of a megabyte and
    more in pages of 2 MB, where Linux has them to give."""
    if size_bytes < LARGE // 2 or sys.platform != "linux":
        return np.frombuffer(mmap.mmap(-1, max(size_bytes, 1)), np.uint8)[:size_bytes]
    whole = -(-size_bytes // LARGE) * LARGE
    region = mmap.mmap(-1, whole + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # where there are none
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(region, np.uint8)
    first = -memory.ctypes.data % LARGE
    return memory[first : first + size_bytes]


def give_back(region: Region, slots: npt.NDArray[np.int64], stride_bytes: int) -> bool:
    """Frees the pages of `slots`, in which nothing may be read or written from now on.

    False where the system has no way to: the slots keep their memory.
    """
    if sys.platform != "linux":
        return False
    for offset, length in _ranges(slots, stride_bytes):
        # Whole pages only: with pages larger than a stride, an edge is a neighbour's too.
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            _advise(region, mmap.MADV_REMOVE, begin, end - begin)
    return True


def take_again(path: Path, slots: npt.NDArray[np.int64], stride_bytes: int) -> bool:
    """Allocates the pages of `slots` that were given back: else a full machine would be a SIGBUS
    at the first write. False if memory is short; some slots may have pages then."""
    fd = os.open(path, os.O_RDWR)
    try:
        for offset, length in _ranges(slots, stride_bytes):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, offset, length)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _ranges(slots: npt.NDArray[np.int64], stride_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of `slots` in the region, neighbours together."""
    ordered = np.sort(slots)
    for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
        if len(run):
            yield int(run[0]) * stride_bytes, len(run) * stride_bytes


def attach_segment(path: Path, size_bytes: int) -> Region:
    """Maps the region that the reader made."""
    fd = os.open(path, os.O_RDWR)
    try:
        if os.fstat(fd).st_size < size_bytes:  # else it would be a SIGBUS at the first read there
            raise ValueError(f"{path} has less than {size_bytes:,} bytes")
        return _map(fd, size_bytes)
    finally:
        os.close(fd)
