"""The cache's bytes: one region of shared memory, made by the reader, mapped by compute.

    /dev/shm/inflash-<user>-<hash of the run directory>     mode 0600

    byte 0                                                        slots × stride_bytes
    ├── slot 0 ──┬── slot 1 ──┬── ... layer 0's ──┬── layer 1's ──┤
       one bundle and the padding that the store gives it, as they lie in the bundle file

The reader is the only writer. Nothing here says what a slot holds: `Resident` does, and a slot may
be read only from its `Resident` to its `Release`. Python has no memory fences, so no flag in this
region synchronises anything.

Slots that are out of use give their pages back to the system, and take new ones when they return.

Not `multiprocessing.shared_memory`: on Python 3.11 the exit of a process that attached unlinks it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError

SHM = Path("/dev/shm")


def segment_path(run_dir: Path) -> Path:
    """Where the cache of the server in `run_dir` lies: one name, so that a crash is cleaned up."""
    digest = hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:12]
    base = SHM if SHM.is_dir() else run_dir
    return base / f"inflash-{os.getuid()}-{digest}"


@contextlib.contextmanager
def create_segment(path: Path, size_bytes: int) -> Iterator[mmap.mmap]:
    """Makes and maps the region; unlinks it at the end. `UserError` if memory is short.

    The pages are allocated here: running out of memory is an error now, not a SIGBUS later.
    """
    path.unlink(missing_ok=True)  # a server that was killed left it; the caller holds the claim
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _allocate(fd, path, size_bytes)
        region = mmap.mmap(fd, size_bytes)
        yield region
        with contextlib.suppress(BufferError):  # a view that outlived its use: the exit unmaps it
            region.close()
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _allocate(fd: int, path: Path, size_bytes: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
        else:
            os.ftruncate(fd, size_bytes)
    except OSError as error:
        stat = os.statvfs(path.parent)
        raise UserError(
            f"the cache of {size_bytes:,} bytes does not fit in {path.parent}"
            f" ({stat.f_bavail * stat.f_frsize:,} bytes free: {error.strerror});"
            " choose a smaller --memory or --cache"
        ) from None


def give_back(region: mmap.mmap, slots: npt.NDArray[np.int32], stride_bytes: int) -> bool:
    """Frees the pages of `slots`, in which nothing may be read or written from now on.

    False where the system has no way to: the slots keep their memory.
    """
    if not hasattr(mmap, "MADV_REMOVE"):  # another system than Linux
        return False
    for offset, length in _ranges(slots, stride_bytes):
        # Whole pages only: with pages larger than a stride, an edge is a neighbour's too.
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            region.madvise(mmap.MADV_REMOVE, begin, end - begin)
    return True


def take_again(path: Path, slots: npt.NDArray[np.int32], stride_bytes: int) -> bool:
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


def _ranges(slots: npt.NDArray[np.int32], stride_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of `slots` in the region, neighbours together."""
    ordered = np.sort(slots).astype(np.int64)
    for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
        if len(run):
            yield int(run[0]) * stride_bytes, len(run) * stride_bytes


def attach_segment(path: Path, size_bytes: int) -> mmap.mmap:
    """Maps the region that the reader made; it lives until the mapping is closed."""
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
