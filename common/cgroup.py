"""The memory cgroups that this process is in, its own first, then their parents: kernel files.

Version 2, and version 1's memory controller, in a container or not. Reads only; a machine that has
neither has no groups. `root` is where the machine's / is: tests give a folder that looks like it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# A limit from here up is none: version 1 writes the largest number of pages that it can count.
LIMIT_BYTES_MAX = 1 << 60


@dataclass(frozen=True)
class Group:
    """One memory cgroup: the folder of its files."""

    folder: Path
    version: int  # 1 or 2


def memory_groups(root: Path = ROOT) -> list[Group]:
    """The groups whose limits hold for this process; empty where there are none."""
    found: list[Group] = []
    for version, mount, mounted in _mounts(root):
        for path in _own_paths(root, version):
            found += [Group(folder, version) for folder in _ancestry(mount, mounted, path)]
    return found


def read_bytes(folder: Path, name: str) -> int | None:
    """The number in a group's file; None if there is no such file, or it says that none is set."""
    try:
        value = int((folder / name).read_text())
    except (OSError, ValueError):  # no such file here; or "max"
        return None
    return value if value < LIMIT_BYTES_MAX else None


def machine_bytes(root: Path = ROOT) -> int:
    """Memory that this machine has, or the tightest cgroup around this process allows."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group in memory_groups(root):
        names = ("memory.limit_in_bytes",) if group.version == 1 else ("memory.max", "memory.high")
        limits = [read_bytes(group.folder, name) for name in names]
        total = min([total, *(limit for limit in limits if limit is not None)])
    return total


def is_limited(root: Path = ROOT) -> bool:
    """Whether a cgroup allows less memory than the machine has."""
    return machine_bytes(root) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mounts(root: Path) -> Iterator[tuple[int, Path, PurePosixPath]]:
    """Version, where it is mounted, and which group of the hierarchy the mount shows."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(), filesystem.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        where = root / _unescape(fields[4]).lstrip("/")
        if kind[0] == "cgroup2":
            yield 2, where, PurePosixPath(fields[3])
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield 1, where, PurePosixPath(fields[3])


def _unescape(path: str) -> str:
    """mountinfo writes a space as \\040."""
    return path.replace("\\040", " ").replace("\\134", "\\")


def _own_paths(root: Path, version: int) -> Iterator[PurePosixPath]:
    """The group of this process in the hierarchy of `version`: at most one."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        ours = number == "0" if version == 2 else "memory" in controllers.split(",")
        if ours and path.startswith("/"):
            yield PurePosixPath(path)


def _ancestry(mount: Path, mounted: PurePosixPath, path: PurePosixPath) -> Iterator[Path]:
    """The folders of the group `path` and of its parents, as far as the mount shows them.

    In a container the path may be the host's, which the mount does not show: what is not there is
    left out, and the mount's own folder is then the group's or a parent's.
    """
    inside = path.relative_to(mounted) if path.is_relative_to(mounted) else path.relative_to("/")
    if ".." in inside.parts:  # a group outside of our cgroup namespace
        inside = PurePosixPath()
    for relative in (inside, *inside.parents):
        folder = mount / relative
        if folder.is_dir():
            yield folder
        if relative == PurePosixPath():
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux, or /proc is hidden
        return []
