"""How large the cache may be now: it shrinks when memory runs short, and grows back.

`Decider` is pure: what the kernel said and the time in, a size out. `Pressure` reads the kernel's
files: the cgroups around this process, /proc/meminfo, and how long tasks stalled for memory (PSI).
Owns no slots: the loop takes slots out of use and puts them back.

                    headroom: limit − what cannot be reclaimed
    0 ─────────── reserve / 2 ─────────── reserve ─────────── reserve + a step ──────────▶
      shrink at once,       leave it as it is        grow a step a second,
      to a whole reserve                             after GROW_AFTER_S of that

The plan leaves the reserve free (common/plan.py), so that a server within its plan never shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cgroup import ROOT, Group, memory_groups, read_bytes
from common.plan import RESERVE_BYTES_MIN, RESERVE_SHARE

LOOK_EVERY_S = 0.2  # a process that takes 160 MB/s uses up the smallest reserve in one
GROW_AFTER_S = 3.0  # of room and no stalls: what was freed a moment ago is often taken again
GROW_EVERY_S = 1.0  # so that what a step does shows in the next decision
STEPS = 16  # of the planned cache: one is what grows at a time, and what a stall takes away
# PSI: share of the last 10 s in which some task, or all tasks, waited for memory. A machine at
# work shows below 1 %; at 10 % and 5 % a process waits longer for its pages than for its reads.
SOME_MAX = 10.0
FULL_MAX = 5.0
# Stalls count only where headroom is below this share of the limit: with room to spare it is
# another group's tasks that wait, in a limit of their own, and our cache would not help them.
NEAR_SHARE = 8


@dataclass(frozen=True)
class Source:
    """A bound on memory as the kernel shows it."""

    name: str
    limit_bytes: int
    headroom_bytes: int  # negative where the limit is below what is in use
    some: float  # PSI avg10, %; 0 where it is not known
    full: float

    @property
    def reserve_bytes(self) -> int:
        return max(RESERVE_BYTES_MIN, self.limit_bytes // RESERVE_SHARE)

    @property
    def stalls(self) -> bool:
        near = self.headroom_bytes < self.limit_bytes // NEAR_SHARE
        return near and (self.some >= SOME_MAX or self.full >= FULL_MAX)


class Decider:
    """Decides the cache's size from one look to the next."""

    def __init__(self, planned_bytes: int, least_bytes: int) -> None:
        """Never above `planned_bytes`, never below `least_bytes`."""
        self._planned = planned_bytes
        self._least = least_bytes
        self._step = max(planned_bytes // STEPS, 1)
        self._calm_since_s: float | None = None
        self._stepped_s = float("-inf")  # when a stall last took a step, or the cache grew one

    def decide(self, sources: Sequence[Source], cache_bytes: int, now_s: float) -> int:
        """The size that a cache of `cache_bytes` should have at the time `now_s`."""
        target = min(cache_bytes, self._planned)
        short = max((_shortage(source) for source in sources), default=0)
        stalls = any(source.stalls for source in sources)
        if short or stalls:
            self._calm_since_s = None
            # avg10 falls slowly: a step a second, or one stall would take the whole cache.
            if stalls and self._may_step(now_s):
                short = max(short, self._step)
            return max(target - short, min(self._least, target))
        growth = min(self._step, self._planned - target)
        spare = min((s.headroom_bytes - s.reserve_bytes for s in sources), default=growth)
        if growth == 0 or spare < growth:
            self._calm_since_s = None
            return target
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s >= GROW_AFTER_S and self._may_step(now_s):
            return target + growth
        return target

    def _may_step(self, now_s: float) -> bool:
        if now_s - self._stepped_s < GROW_EVERY_S:
            return False
        self._stepped_s = now_s
        return True


def _shortage(source: Source) -> int:
    """Bytes that bring the reserve back, where half of it is gone; else 0."""
    if source.headroom_bytes >= source.reserve_bytes // 2:
        return 0
    return source.reserve_bytes - source.headroom_bytes


class Pressure:
    """Looks at the kernel's files and asks the decider."""

    def __init__(self, planned_bytes: int, least_bytes: int, root: Path = ROOT) -> None:
        """`planned_bytes` and `least_bytes`: the plan's cache_bytes and cache_bytes_min."""
        self._decider = Decider(planned_bytes, least_bytes)
        self._root = root
        self._groups = memory_groups(root)
        self._looked_s = float("-inf")

    def due(self, now_s: float) -> bool:
        """Whether it is time to look."""
        return now_s - self._looked_s >= LOOK_EVERY_S

    def look(self, now_s: float, cache_bytes: int) -> int | None:
        """The size that the cache, now `cache_bytes`, should have; None if it may stay as it is."""
        self._looked_s = now_s
        target = self._decider.decide(read_sources(self._groups, self._root), cache_bytes, now_s)
        return None if target == cache_bytes else target


def read_sources(groups: Iterable[Group], root: Path = ROOT) -> list[Source]:
    """The bounds that there are: groups with a limit, and the machine itself."""
    found = [_group_source(group) for group in groups]
    found.append(_machine_source(root))
    return [source for source in found if source is not None]


def _group_source(group: Group) -> Source | None:
    folder = group.folder
    if group.version == 1:
        names, used_name = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes"), "usage_in_bytes"
    else:
        names, used_name = ("memory.max", "memory.high"), "current"
    limits = [limit for name in names if (limit := read_bytes(folder, name)) is not None]
    used = read_bytes(folder, f"memory.{used_name}")
    if used is None or not limits:
        return None
    stat = _numbers(folder / "memory.stat")
    headroom = min(limits) - used + _reclaimable(stat, "total_" if group.version == 1 else "")
    some, full = _stalled(folder / "memory.pressure")
    return Source(str(folder), min(limits), headroom, some, full)


def _reclaimable(stat: dict[str, int], prefix: str) -> int:
    """File pages that the kernel drops when it needs room: those that no process has mapped.

    Mapped ones are code that runs. The cache is mapped too, but it is counted as shmem.
    """
    file = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    mapped = stat.get(f"{prefix}mapped_file", stat.get("file_mapped", 0))
    return max(file - max(mapped - stat.get(f"{prefix}shmem", 0), 0), 0)


def _machine_source(root: Path) -> Source | None:
    meminfo = _numbers(root / "proc/meminfo")
    if "MemTotal:" not in meminfo or "MemAvailable:" not in meminfo:
        return None
    total, available = (meminfo[name] * 1024 for name in ("MemTotal:", "MemAvailable:"))
    return Source("the machine", total, available, *_stalled(root / "proc/pressure/memory"))


def _numbers(path: Path) -> dict[str, int]:
    """First word of each line -> the number that follows it."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _stalled(path: Path) -> tuple[float, float]:
    """`avg10` of "some" and of "full" in a PSI file; zeros where the kernel has none."""
    found = {"some": 0.0, "full": 0.0}
    for line in _text(path).splitlines():
        kind, *fields = line.split()
        for field in fields:
            key, _, value = field.partition("=")
            if kind in found and key == "avg10":
                found[kind] = float(value)
    return found["some"], found["full"]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such file here, or PSI is switched off
        return ""
