"""The cache's bytes: one region of shared memory, made by the reader, mapped by compute.

    /dev/shm/inflash-<user>-<hash of the run directory>     mode 0600

    byte 0                                                        slots × stride_bytes
    ├── slot 0 ──┬── slot 1 ──┬── ... layer 0's ──┬── layer 1's ──┤
       one bundle and the padding that the store gives it, as they lie in the bundle file

The reader is the only writer. Nothing here says what a slot holds: `Resident` does, and a slot may
be read only from its `Resident` to its `Release`. Python has no memory fences, so no flag in this
region synchronises anything.

Not `multiprocessing.shared_memory`: on Python 3.11 the exit of a process that attached unlinks it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

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


def attach_segment(path: Path, size_bytes: int) -> mmap.mmap:
    """Maps the region that the reader made; it lives until the mapping is closed."""
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
