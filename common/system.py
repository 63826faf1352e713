"""What the system tells of a drive and of its own limits. Reads files of the kernel; asks nothing
of a device, and changes nothing. What it does not tell is None.

`root` is where the machine's / is: tests give a folder that looks like it.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cgroup import is_limited, machine_bytes

ROOT = Path("/")
VIRTUAL = "haltpoll"  # the driver of virtual cores that wait
SECTOR_BYTES = 512  # of /sys/block/*/stat, whatever the drive's own
_LIFE_STEP = 10  # percent of a drive's life that a step of life_time stands for


@dataclass(frozen=True)
class DriveFacts:
    """A block device."""

    name: str
    model: str | None
    rotational: bool | None
    bytes_read: int | None  # since the machine started, by everyone
    bytes_written: int | None
    temperature_c: float | None
    temperature_max_c: float | None  # above it the drive slows down, or ends
    wear_percent: int | None  # of its life that is used up, at most


@dataclass(frozen=True)
class Limits:
    """What bounds a server."""

    memory_bytes: int
    memory_limited: bool  # by a cgroup, below what the machine has
    memlock_bytes: int | None  # None: no limit
    open_files: int | None
    aio_events_max: int | None  # asynchronous reads, all processes together
    aio_events_used: int | None
    shm_bytes: int | None  # of /dev/shm, where the cache lies
    shm_free_bytes: int | None
    swap_bytes: int  # that there is


def drive_facts(path: Path, root: Path = ROOT) -> DriveFacts | None:
    """The drive that holds `path`; None if the system shows none, as of a network's."""
    device = os.stat(path).st_dev
    link = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not link.exists():
        return None
    folder = link.resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    return facts_of(folder)


def facts_of(folder: Path) -> DriveFacts:
    """Of the device whose folder in /sys this is."""
    stat = (_text(folder / "stat") or "").split()
    rotational = _text(folder / "queue/rotational")
    sensors = [*folder.glob("device/hwmon*"), *folder.glob("device/hwmon/hwmon*"),
               *folder.glob("device/device/hwmon*")]  # fmt: skip
    sensor = next((one for one in sensors if (one / "temp1_input").exists()), None)
    read, written = (int(stat[2]), int(stat[6])) if len(stat) > 6 else (None, None)
    limit = None
    if sensor is not None:
        limit = _degrees(sensor / "temp1_max") or _degrees(sensor / "temp1_crit")
    return DriveFacts(
        name=folder.name,
        model=_text(folder / "device/model") or _text(folder / "device/name"),
        rotational=None if rotational is None else rotational == "1",
        bytes_read=None if read is None else read * SECTOR_BYTES,
        bytes_written=None if written is None else written * SECTOR_BYTES,
        temperature_c=None if sensor is None else _degrees(sensor / "temp1_input"),
        temperature_max_c=limit,
        wear_percent=_wear(folder),
    )


def _degrees(path: Path) -> float | None:
    text = _text(path)
    return int(text) / 1000 if text and text.lstrip("-").isdecimal() else None


def _wear(folder: Path) -> int | None:
    """Of eMMC and UFS. An NVMe drive tells it by a command that takes root, and is not asked."""
    texts = [_text(folder / "device/life_time")]
    health = "device/health_descriptor/life_time_estimation_"
    texts += [_text(folder / f"{health}{kind}") for kind in "ab"]
    steps = [
        int(step, 16) for text in texts if text for step in re.findall(r"0x[0-9a-fA-F]+", text)
    ]
    known = [step for step in steps if step]
    return min(_LIFE_STEP * max(known), 100) if known else None


def limits(root: Path = ROOT) -> Limits:
    """The limits around this process."""
    shm = root / "dev/shm"
    space = os.statvfs(shm) if shm.is_dir() else None
    return Limits(
        memory_bytes=machine_bytes(root),
        memory_limited=is_limited(root),
        memlock_bytes=_soft(resource.RLIMIT_MEMLOCK) if hasattr(resource, "RLIMIT_MEMLOCK") else 0,
        open_files=_soft(resource.RLIMIT_NOFILE),
        aio_events_max=_number(root / "proc/sys/fs/aio-max-nr"),
        aio_events_used=_number(root / "proc/sys/fs/aio-nr"),
        shm_bytes=None if space is None else space.f_frsize * space.f_blocks,
        shm_free_bytes=None if space is None else space.f_frsize * space.f_bavail,
        swap_bytes=_swap_bytes(root),
    )


def swap_written_bytes(root: Path = ROOT) -> int | None:
    """Bytes written to swap since the machine started, by everyone."""
    match = re.search(r"^pswpout (\d+)$", _text(root / "proc/vmstat") or "", re.MULTILINE)
    return int(match[1]) * os.sysconf("SC_PAGE_SIZE") if match else None


@functools.cache
def cores() -> int:
    """Those that this process might use when it first asked."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_cache_bytes(root: Path = ROOT) -> int | None:
    """The largest cache that a core has, or shares with others; None where nothing tells."""
    return max((size for _, _, size in _caches(root)), default=None)


def first_cache_bytes(root: Path = ROOT) -> int | None:
    """A core's nearest cache of data; None where nothing tells."""
    found = (size for level, kind, size in _caches(root) if level == "1" and kind != "Instruction")
    return next(found, None)


def _caches(root: Path) -> Iterator[tuple[str, str, int]]:
    """Level, type and bytes of each cache of a core."""
    for path in root.glob("sys/devices/system/cpu/cpu0/cache/*/size"):
        level, kind, size = (_text(path.with_name(n)) or "" for n in ("level", "type", "size"))
        if size[:-1].isdecimal() and size[-1] == "K":
            yield level, kind, 1024 * int(size[:-1])


def idle_driver(root: Path = ROOT) -> str:
    """What drives cores that wait, by Linux' name for it; "" where nothing tells."""
    return _text(root / "sys/devices/system/cpu/cpuidle/current_driver") or ""


def processor(root: Path = ROOT) -> str:
    """Its name."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _swap_bytes(root: Path) -> int:
    lines = (_text(root / "proc/swaps") or "").splitlines()[1:]
    return sum(1024 * int(line.split()[2]) for line in lines if len(line.split()) > 2)


def _soft(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
