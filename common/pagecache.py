"""The page cache that our own imports fill: charged to our cgroup, and of no use once imported."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from common.cgroup import is_limited
from common.store.store import forget_pages


def forget_imports() -> None:
    """Drops the pages of every module's source, bytecode and shared object that nothing has mapped,
    if a cgroup limits us: elsewhere they are of use to the next start.

    Reading ahead in torch's shared objects brings in 330 MB that no process maps, and Python's
    files another 110. What is mapped stays; what is needed again is read again.
    """
    if not is_limited():
        return
    for path in {*_module_files(), *_mapped_files()}:
        with contextlib.suppress(OSError):  # in an archive, or replaced since
            fd = os.open(path, os.O_RDONLY)
            try:
                forget_pages(fd)
            finally:
                os.close(fd)


def _module_files() -> Iterator[str]:
    for module in list(sys.modules.values()):
        for name in ("__file__", "__cached__"):
            path = getattr(module, name, None)
            if isinstance(path, str):
                yield path


def _mapped_files() -> Iterator[str]:
    """Shared objects, by the process's own map; none on a system without /proc."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        path = line.partition("/")[2]
        if ".so" in path:
            yield f"/{path}"
