"""A core of its own for compute's first thread.

That thread does most of a token's work, and what it waits for others make. With two cores it often
found both taken when it could go on, by reader, predictor and its own helper (docs/measurements.md,
"A core of its own"). So it has one, with ZeroMQ's thread that brings its messages, and all other
threads of a server have the rest. But the reader, while a prompt streams whole layers: compute's
threads are busy all the time then, and the one that shared its core with it kept the other waiting.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from common.system import ROOT, VIRTUAL, cores, idle_driver

CORES = 2  # with how many it was measured


class Apart:
    """The setting `apart`, in force for this process: each method is of the thread that calls it,
    and of those that it starts from then on. Without a core of its own for the first thread they
    do nothing."""

    def __init__(self, setting: str, root: Path = ROOT) -> None:
        """`setting` is auto, on or off."""
        self.core: int | None = None
        """The first thread's own."""
        self._roams = True
        if why := _why_not(setting, root):
            self.reason = f"threads go wherever the system puts them: {why}"
            return
        self._all = os.sched_getaffinity(0)
        self.core = min(self._all)
        self.reason = f"core {self.core} is the first thread's own"

    def roam(self, wanted: bool) -> None:
        """It may use all cores, or keeps off the first thread's."""
        if self.core is not None and wanted != self._roams:
            self._roams = wanted
            _stay(self._all if wanted else self._all - {self.core})

    def take(self) -> None:
        """It runs on its own core and on no other."""
        if self.core is not None:
            _stay({self.core})


def _stay(on: set[int]) -> None:
    # None of them may be left to us since: a server is slower then, and does not end.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, on)


def _why_not(setting: str, root: Path) -> str:
    """Why there is no core of its own; "" if there is."""
    count = cores()  # which is asked for before any is left
    if setting == "off":
        return "apart is off"
    if not hasattr(os, "sched_setaffinity"):
        return "this system has no way to say where"
    if count == 1:
        return "there is one core"
    if setting == "auto" and count != CORES:
        return f"there are {count} cores, and not {CORES}"
    if setting == "auto" and idle_driver(root) != VIRTUAL:
        return f"they are not driven by {VIRTUAL}, so that other programs may want them as well"
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except OSError as error:  # a sandbox's filter
        return f"it may not say where ({error.strerror})"
    return ""
