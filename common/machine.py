"""What this machine has to compute with."""

from __future__ import annotations

import os
from pathlib import Path

from common.config import parse_size

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_cache_bytes(caches: Path = CACHES) -> int | None:
    """The largest cache that a core has, or shares with others; None where nothing tells."""
    sizes = []
    for path in caches.glob("index*/size"):
        try:
            sizes.append(parse_size(path.read_text().strip() + "iB"))  # the kernel's K is 1,024
        except (OSError, ValueError):
            continue
    return max(sizes, default=None)
