"""What the kernel counts of processes: bytes from drives, pages that had to be read, peaks.

Linux only; elsewhere, and of processes that are gone, there is no figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_MAJOR_FAULTS = 9  # of /proc/PID/stat, counted from the state, which follows the name


def bytes_read(pids: Iterable[int]) -> int | None:
    """Bytes that these processes together had read from drives until now; None: not counted."""
    return _sum(_field(pid, "io", "read_bytes") for pid in pids)


def major_faults(pids: Iterable[int]) -> int:
    """Pages that these processes' maps had to read until now."""
    return _sum(map(_major_faults, pids)) or 0


def peak_bytes(pid: int) -> int | None:
    """The most that a process had mapped in memory at once, what it shares included."""
    kilobytes = _field(pid, "status", "VmHWM")
    return None if kilobytes is None else 1024 * kilobytes


def resident_bytes(pids: Iterable[int]) -> int | None:
    """What these processes have in memory now; what they share counts once. None: not counted."""
    sizes = _sum(_field(pid, "smaps_rollup", "Pss") for pid in pids)
    return None if sizes is None else 1024 * sizes


def _field(pid: int, file: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+)", _text(pid, file), re.MULTILINE)
    return int(found[1]) if found else None


def _major_faults(pid: int) -> int | None:
    fields = _text(pid, "stat").rpartition(")")[2].split()  # a name may have any character
    return int(fields[_MAJOR_FAULTS]) if fields else None


def _text(pid: int, file: str) -> str:
    try:
        return (_PROC / f"{pid}" / file).read_text()
    except OSError:
        return ""


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
