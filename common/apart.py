"""A core of its own for compute's first thread.

That thread does most of a token's work, and what it waits for others make. With two cores it often
found both taken when it could go on, by reader, predictor and its own helper (docs/measurements.md,
"A core of its own"). So it has one, with ZeroMQ's thread that brings its messages, and all other
threads of a server have the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.system import ROOT, VIRTUAL, cores, idle_driver

CORES = 2  # with how many it was measured


def own_core(setting: str, root: Path = ROOT) -> tuple[int | None, str]:
    """The core that is compute's first thread's own, None where threads go wherever the system puts
    them; and why: a sentence. `setting` is auto, on or off. Ask before `leave`."""
    count = cores()
    why = ""
    if setting == "off":
        why = "apart is off"
    elif not hasattr(os, "sched_setaffinity"):
        why = "this system has no way to say where"
    elif count == 1:
        why = "there is one core"
    elif setting == "auto" and count != CORES:
        why = f"there are {count} cores, and not {CORES}"
    elif setting == "auto" and idle_driver(root) != VIRTUAL:
        why = f"cores are not driven by {VIRTUAL}: they may be others' as well"
    if why:
        return None, f"threads go wherever the system puts them: {why}"
    core = min(os.sched_getaffinity(0))
    return core, f"core {core} is the first thread's own"


def leave(core: int) -> None:
    """This thread, and those that it starts from now on, keep off a core."""
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {core})


def take(core: int) -> None:
    """This thread runs on that core alone."""
    os.sched_setaffinity(0, {core})
