"""Who has a core of its own, and who keeps off it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from common import apart

DRIVER = "sys/devices/system/cpu/cpuidle/current_driver"


def machine(root: Path, driver: str) -> Path:
    (root / DRIVER).parent.mkdir(parents=True)
    (root / DRIVER).write_text(f"{driver}\n")
    return root


@pytest.mark.parametrize(
    ("setting", "cores", "driver", "reason"),
    [
        ("auto", 2, "haltpoll", "the first thread's own"),
        ("auto", 2, "intel_idle", "not driven by haltpoll"),
        ("auto", 4, "haltpoll", "there are 4 cores, and not 2"),
        ("on", 4, "intel_idle", "the first thread's own"),
        ("on", 1, "haltpoll", "there is one core"),
        ("off", 2, "haltpoll", "apart is off"),
    ],
)
def test_who_has_one(
    setting: str,
    cores: int,
    driver: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apart, "cores", lambda: cores)
    made = apart.Apart(setting, machine(tmp_path, driver))
    assert reason in made.reason
    assert made.core == (min(os.sched_getaffinity(0)) if "own" in reason else None)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_threads_keep_off_the_first_ones_core() -> None:
    all_cores, seen = os.sched_getaffinity(0), list[set[int]]()
    made = apart.Apart("on")
    core = min(all_cores)

    def helper() -> None:
        seen.append(os.sched_getaffinity(0))

    def first() -> None:
        made.roam(False)
        started = threading.Thread(target=helper)
        started.start()
        started.join()
        made.roam(True)
        helper()
        made.take()
        helper()

    thread = threading.Thread(target=first)  # this one goes on wherever it likes
    thread.start()
    thread.join()
    assert seen == [all_cores - {core}, all_cores, {core}]
    assert os.sched_getaffinity(0) == all_cores


def test_a_system_that_forbids_it_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(apart, "cores", lambda: 2)
    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    made = apart.Apart("auto", machine(tmp_path, "haltpoll"))
    assert made.core is None
    assert "Operation not permitted" in made.reason


def test_off_changes_nothing() -> None:
    before, made = os.sched_getaffinity(0), apart.Apart("off")
    made.roam(False)
    made.take()
    assert os.sched_getaffinity(0) == before
