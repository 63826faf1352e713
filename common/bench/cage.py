"""A contender's memory: a cgroup of its own that limits and counts it, and a page cache that is
cold when it starts.

Owns the groups it makes and the processes started in them: leaving a `Cage` ends both. The group
lies beside the machine's outermost ones (in a container: the container's), not below our own, so
that the cap is its only limit and nothing that this process touched counts in it. Where no group
can be made (no root, no memory controller) a cage limits and counts nothing, and says why.

The page cache is charged to whoever touched a page first: a file left warm by another process
escapes the cap. `forget` drops it, and `cached_bytes` proves that it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from common.cgroup import ROOT, memory_groups, read_bytes
from common.errors import UserError
from common.store.store import forget_pages

END_S = 10.0  # for killed processes to be gone, and with them the group
POLL_S = 0.02
FORGET_TRIES = 5
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class _Names:
    """The kernel's names of a group's files: memory is swap, too, in version 1's `swap_*`."""

    limit: str
    peak: str
    swap_limit: str
    swap_peak: str
    events: str


_NAMES = {
    1: _Names(
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.memsw.max_usage_in_bytes",
        "memory.oom_control",
    ),
    2: _Names(
        "memory.max", "memory.peak", "memory.swap.max", "memory.swap.peak", "memory.events"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended in its cage."""

    stdout: str
    stderr: str
    rc: int  # exit status; minus the signal's number where one ended it
    timed_out: bool
    peak_bytes: int | None  # of the whole process tree, its page cache included; None: not counted
    swap_bytes: int | None  # peak
    oom_killed: bool
    enforced: bool  # the cap held; True for a cap of None if the peak was counted
    why_not: str  # a sentence; "" if enforced


@dataclass(frozen=True)
class _Reading:
    peak_bytes: int | None = None
    swap_bytes: int | None = None
    oom_killed: bool = False


class Cage:
    """A memory cgroup in which several commands can be started; `cap_bytes` None counts only.

    A context manager. After it was left, its readings are the last ones.
    """

    def __init__(self, cap_bytes: int | None, *, root: Path = ROOT):
        self.cap_bytes = cap_bytes
        self.why_not = ""
        self._root = root
        self._folder: Path | None = None
        self._version = 2
        self._processes: list[subprocess.Popen[bytes]] = []
        self._last = _Reading()

    @property
    def enforced(self) -> bool:
        """Whether the cap holds and the peak is counted; else `why_not` is a sentence."""
        return not self.why_not

    @property
    def peak_bytes(self) -> int | None:
        """The most that the cage's processes held at once, their page cache included."""
        return self._read().peak_bytes

    @property
    def swap_bytes(self) -> int | None:
        """The most that they had swapped out; None where it is not counted."""
        return self._read().swap_bytes

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel killed one of them for want of memory."""
        return self._read().oom_killed

    def __enter__(self) -> Self:
        reasons = []
        for group in reversed(memory_groups(self._root)):  # the outermost first
            try:
                self._make(group.folder, group.version)
                return self
            except OSError as error:
                reasons.append(f"{group.folder}: {error.strerror}")
        found = "; ".join(reasons) or "this system has none"
        self.why_not = f"no memory cgroup could be made, so no cap was enforced ({found})"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def start(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts `command` in the cage: what it execs is in the group from its first page.

        Args:
            env: its whole environment; None: ours.
            stdout, stderr: as `subprocess.Popen` takes them; None: ours.
        """
        enter = ["/bin/sh", "-c", 'exec "$@"', "cage"]
        if self._folder is not None:
            script = 'echo $$ > "$1" && shift && exec "$@"'
            enter = ["/bin/sh", "-c", script, "cage", str(self._folder / "cgroup.procs")]
        process = subprocess.Popen(
            [*enter, *map(str, command)],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # the terminal's Ctrl-C is for us; we end them
        )
        self._processes.append(process)
        return process

    def end(self) -> None:
        """Kills what still runs in the cage, and removes the group. A second call does nothing."""
        for process in self._processes:
            # Without a group, a process's session is what we know of its children.
            if self._folder is None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if self._folder is not None:
            _kill_all(self._folder)
        for process in self._processes:
            process.wait(END_S)
        if self._folder is not None:
            self._last = self._read()
            _remove(self._folder)
            self._folder = None

    def _make(self, parent: Path, version: int) -> None:
        """A group below `parent`; `OSError` where it cannot limit or count memory."""
        folder = Path(tempfile.mkdtemp(prefix=f"inflash-bench-{os.getpid()}-", dir=parent))
        names = _NAMES[version]
        try:
            if not (folder / names.peak).exists():
                raise FileNotFoundError(0, f"its groups have no {names.peak}")
            if self.cap_bytes is not None:
                (folder / names.limit).write_text(str(self.cap_bytes))
                self._forbid_swap(folder, version)
        except BaseException:
            _remove(folder)
            raise
        self._folder, self._version = folder, version

    def _forbid_swap(self, folder: Path, version: int) -> None:
        """Swap would be memory beyond the cap. A kernel without swap accounting has no files."""
        if version == 1:
            (folder / "memory.swappiness").write_text("0")
        path = folder / _NAMES[version].swap_limit
        if path.exists():
            path.write_text(str(self.cap_bytes) if version == 1 else "0")

    def _read(self) -> _Reading:
        folder, names = self._folder, _NAMES[self._version]
        if folder is None:
            return self._last
        peak = read_bytes(folder, names.peak)
        swap = read_bytes(folder, names.swap_peak)
        if self._version == 1 and swap is not None and peak is not None:
            swap = max(0, swap - peak)  # version 1 counts memory and swap together
        kills = re.search(r"^oom_kill (\d+)$", (folder / names.events).read_text(), re.MULTILINE)
        return _Reading(peak, swap, bool(kills and int(kills[1])))


def run(
    command: Sequence[str | Path],
    cap_bytes: int | None,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Outcome:
    """Runs `command` in a cage of its own until it ends or `timeout_s` have passed.

    Nothing that it started outlives it. `env` is its whole environment; None: ours.
    """
    timed_out = False
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        with Cage(cap_bytes) as cage:
            process = cage.start(command, env=env, cwd=cwd, stdout=stdout, stderr=stderr)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
        return Outcome(
            stdout=_text(stdout),
            stderr=_text(stderr),
            rc=process.returncode,
            timed_out=timed_out,
            peak_bytes=cage.peak_bytes,
            swap_bytes=cage.swap_bytes,
            oom_killed=cage.oom_killed,
            enforced=cage.enforced,
            why_not=cage.why_not,
        )


def forget(paths: Iterable[Path], *, machine_wide: bool = False) -> int:
    """Drops files' pages from the page cache; a folder is all files in it. Returns the bytes that
    are still cached: 0 is cold.

    `machine_wide` drops every clean page of the machine first, where we are root. What another
    process maps, or a file system in memory holds, stays.
    """
    files = list(_files(paths))
    if machine_wide:
        os.sync()
        with contextlib.suppress(OSError):
            _DROP_CACHES.write_text("1")
    for _ in range(FORGET_TRIES):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a page that is not written yet cannot be dropped
                forget_pages(file.fileno())
        left = cached_bytes(files)
        if not left:
            break
        time.sleep(POLL_S)  # a read in flight, of a process that was just killed, holds its pages
    return left


def cached_bytes(paths: Iterable[Path]) -> int:
    """Bytes of these files that the page cache holds; a folder is all files in it.

    Linux counts a file that this user may not write as wholly cached.
    """
    return sum(_cached(path) for path in _files(paths))


def _cached(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:  # cannot be mapped
        return 0
    with path.open("rb") as file, contextlib.closing(
        # A private map may be written, as ctypes asks of a buffer; mapping alone reads nothing.
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    ) as mapped:  # fmt: skip
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        first = ctypes.c_char.from_buffer(mapped)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            status = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(first)),
                ctypes.c_size_t(size),
                ctypes.c_void_p(pages.ctypes.data),
            )
            if status:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        finally:
            del first  # the map cannot be closed while this points into it
    return min(size, int((pages & 1).sum()) * mmap.PAGESIZE)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file())
        else:
            yield path


def _kill_all(folder: Path) -> None:
    """Kills a group's processes until there is none: one may fork while we look."""
    deadline = time.monotonic() + END_S
    while pids := [int(line) for line in (folder / "cgroup.procs").read_text().split()]:
        if time.monotonic() > deadline:
            raise UserError(f"processes {pids} of the memory cgroup {folder} do not end; end them")
        for pid in pids:
            if pid > 0:  # 0: of another pid namespace
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + END_S
    while True:
        try:
            return folder.rmdir()
        except OSError as error:  # the last process's exit is being counted
            if time.monotonic() > deadline:
                raise UserError(
                    f"the memory cgroup {folder} cannot be removed ({error.strerror}); once"
                    " nothing runs in it: rmdir it"
                ) from None
            time.sleep(POLL_S)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
