"""A store in the making: the folder DST.partial, its lock, its journal, and its publication.

    DST.partial/convert.journal    JSON lines: the fingerprint, then each finished job's files
    DST.partial/.../x.tmp          a file that is being written

A file is written as .tmp, synced, renamed, and only then journalled; the manifest comes last; then
the folder is renamed to DST. So a conversion that is killed at any moment leaves nothing that opens
as a store, and the next one goes on after the last journalled job. The journal outlives the rename
by an instant, and means nothing in a published store. Refuses a second writer, and a DST that
exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from common.errors import StoreError
from common.store.manifest import MANIFEST, VERSION, FileEntry
from common.store.store import PARTIAL_SUFFIX

JOURNAL = "convert.journal"


class Sink:
    """A file being written: counts and digests what goes in."""

    def __init__(self, file: FileIO, hasher: ThreadPoolExecutor):
        self.size = 0
        self._file = file
        self._hasher = hasher
        self._digest = hashlib.sha256()

    def write(self, data: memoryview | bytes) -> None:
        # The digest runs beside the write: each takes about as long as the other.
        digested = self._hasher.submit(self._digest.update, data)
        left = memoryview(data)
        while left:  # a raw write may be short
            left = left[self._file.write(left) :]
        digested.result()
        self.size += len(data)

    def sync(self) -> str:
        """Waits until the drive has it; returns the SHA-256 in hex."""
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


class Partial:
    """The unfinished store. Made by `open_partial`, which holds its lock."""

    def __init__(self, folder: Path, dst: Path, fingerprint: str):
        self.folder = folder
        self.started_over = False  # there was work of another source or format
        self._dst = dst
        self._header = json.dumps({"version": VERSION, "fingerprint": fingerprint})
        self._hasher = ThreadPoolExecutor(1, "sha256")
        self.done = self._resume()

    def close(self) -> None:
        self._hasher.shutdown()

    @property
    def done_bytes(self) -> int:
        return sum(entry.size for entries in self.done.values() for entry in entries)

    def _resume(self) -> dict[str, list[FileEntry]]:
        """The finished jobs; everything else in the folder is removed."""
        journal = self.folder / JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        resumed = lines[:1] == [self._header]
        self.started_over = bool(lines) and not resumed
        done = dict(_journalled(self.folder, lines[1:])) if resumed else {}
        kept = {self.folder / e.path for entries in done.values() for e in entries}
        _remove_all_but(self.folder, kept | {journal})
        # Written anew: its last line may be cut short.
        records = [_record(job, entries) for job, entries in done.items()]
        temporary = self.folder / f"{JOURNAL}.tmp"
        with temporary.open("w") as file:
            file.write("".join(f"{line}\n" for line in [self._header, *records]))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(journal)
        sync_folder(self.folder)
        return done

    @contextlib.contextmanager
    def file(self, path: str, entries: list[FileEntry]) -> Iterator[Sink]:
        """A sink for the file `path` of the store; once whole, it is appended to `entries`."""
        target = self.folder / path
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp")
        with temporary.open("wb", buffering=0) as raw:
            sink = Sink(raw, self._hasher)
            yield sink
            entry = FileEntry(path, sink.size, sink.sync())
        temporary.rename(target)
        sync_folder(target.parent)
        entries.append(entry)

    def finish(self, job: str, entries: list[FileEntry]) -> None:
        """Journals a job whose files are all in place."""
        with (self.folder / JOURNAL).open("a") as file:
            file.write(f"{_record(job, entries)}\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[job] = entries

    def publish(self, manifest: bytes) -> None:
        """Writes the manifest, and makes the folder a store."""
        sync_folder(self.folder)
        with self.file(MANIFEST, []) as sink:
            sink.write(manifest)
        refuse_existing(self._dst)
        self.folder.rename(self._dst)
        sync_folder(self._dst.parent)
        (self._dst / JOURNAL).unlink()


@contextlib.contextmanager
def open_partial(dst: Path, fingerprint: str) -> Iterator[Partial]:
    """The unfinished store of `dst`, new or found, under a lock; `StoreError` if it is in use.

    Work of another `fingerprint` is removed. Whatever happens, what was journalled stays.
    """
    folder = partial_of(dst)
    refuse_existing(dst)
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        _lock(fd, folder)
        refuse_existing(dst)  # another conversion may have finished before the lock
        partial = Partial(folder, dst, fingerprint)
        try:
            yield partial
        finally:
            partial.close()
    finally:
        os.close(fd)


def partial_of(dst: Path) -> Path:
    dst = dst.absolute()  # "." has no name
    return dst.with_name(dst.name + PARTIAL_SUFFIX)


def refuse_existing(dst: Path) -> None:
    if os.path.lexists(dst):
        raise StoreError(f"{dst} exists already: remove it or choose another folder")


def partial_bytes(dst: Path) -> int:
    """Bytes that an unfinished conversion to `dst` takes: they are used again, or freed."""
    folder = partial_of(dst)
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _lock(fd: int, folder: Path) -> None:
    busy = StoreError(f"another `inflash convert` is writing {folder}: wait for it or stop it")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(fd), folder.stat())
    except OSError:  # locked, or published and so renamed in between
        raise busy from None
    if not same:
        raise busy


def _record(job: str, entries: list[FileEntry]) -> str:
    return json.dumps({"job": job, "files": [[e.path, e.size, e.sha256] for e in entries]})


def _journalled(folder: Path, lines: list[str]) -> Iterator[tuple[str, list[FileEntry]]]:
    for line in lines:
        try:
            record = json.loads(line)
            entries = [FileEntry(*fields) for fields in record["files"]]
        except (ValueError, KeyError, TypeError):
            return  # the line that was being written when the conversion was killed
        if all(_has_size(folder / e.path, e.size) for e in entries):
            yield record["job"], entries


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _remove_all_but(folder: Path, kept: set[Path]) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and any(path in other.parents for other in kept):
            _remove_all_but(path, kept)
        elif path.is_dir():
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (renames, new files) durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
