"""What the reader needs of whatever makes its reads, and what all ways of reading share.

A backend reads straight into the cache's slots. It decides nothing about neurons: it is given
reads and says when they are done. tests/contract/test_backends.py is what each must pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from services.reader.reads import Reads

Memory = npt.NDArray[np.uint8]
"""The cache's bytes, uint8 [slots, stride_bytes], page-aligned."""


RECHECK_S = 0.001


class Completion(NamedTuple):
    """A batch is over: no read of it touches memory any more."""

    tag: int
    error: str  # "" if every read brought all its bytes
    failed: int  # the first read that failed, as an index into the batch; -1 if none did


class Backend(Protocol):
    """One way of reading. Not for two threads. `close` it, whatever happened before."""

    name: str
    direct: bool  # the page cache is passed by

    def submit(self, tag: int, file: int, reads: Reads) -> None:
        """Begins `reads` (at least one) of bundle file number `file`; never waits for the drive.
        Completes them under `tag`. `ValueError` if the backend is closed."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when `completed` has something to do: soon, but not
        for every read. While reads are under way, ask `completed` every RECHECK_S as well."""

    def completed(self) -> list[Completion]:
        """The batches that are over since the last call. Keeps the queue of the drive filled,
        so it is to be called whenever `fileno` is readable."""

    def close(self) -> None:
        """Drops what is queued, waits for what is under way, closes the files."""


def open_files(paths: Sequence[Path], *, direct: bool) -> list[int]:
    """Descriptors of the bundle files; with `direct`, past the page cache. `OSError` if not."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct:
        if not hasattr(os, "O_DIRECT"):
            raise OSError("this system has no O_DIRECT")
        flags |= os.O_DIRECT
    files: list[int] = []
    try:
        for path in paths:
            files.append(os.open(path, flags))
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(files[-1], 0, 0, os.POSIX_FADV_RANDOM)  # read nothing ahead
    except OSError:
        close_files(files)
        raise
    return files


def close_files(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def forget_pages(file: int, offset: int, size: int) -> None:
    """Drops what a buffered read left in the page cache: it is charged to us, and the memory that
    we may use is in the slots."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)


def short_read(got: int, expected: int) -> str:
    """The error of a read that ended early."""
    return f"short read: {got:,} of {expected:,} bytes"
