"""Cores are kept from halting while it is wanted, where it may be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.system import ROOT
from services.compute.awake import LATENCY, Awake

REAL = ROOT / LATENCY
DRIVER = "sys/devices/system/cpu/cpuidle/current_driver"


def system(root: Path, driver: str = "haltpoll", latency: bool = True) -> Path:
    (root / DRIVER).parent.mkdir(parents=True)
    (root / DRIVER).write_text(f"{driver}\n")
    (root / LATENCY).parent.mkdir()
    if latency:
        (root / LATENCY).touch()
    return root


@pytest.mark.parametrize(
    ("setting", "driver", "held"),
    [
        ("auto", "haltpoll", True),
        ("auto", "intel_idle", False),
        ("on", "intel_idle", True),
        ("off", "haltpoll", False),
    ],
)
def test_who_is_kept(setting: str, driver: str, held: bool, tmp_path: Path) -> None:
    awake = Awake(setting, system(tmp_path, driver))
    awake.keep(True)
    assert (tmp_path / LATENCY).read_bytes() == (bytes(4) if held else b"")
    assert awake.reason.startswith("cores do not halt" if held else "cores halt")


def test_auto_goes_without_what_it_may_not_have(tmp_path: Path) -> None:
    awake = Awake("auto", system(tmp_path, latency=False))
    awake.keep(True)
    assert "No such file" in awake.reason


def test_on_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"INFLASH_AWAKE: on, but .*cpu_dma_latency.*No such file"):
        Awake("on", system(tmp_path, latency=False))


@pytest.mark.skipif(not os.access(REAL, os.R_OK | os.W_OK), reason=f"{REAL} takes root")
def test_the_kernel_is_told_and_told_no_more() -> None:
    def asked() -> int:  # by us: other servers may ask, too
        return sum(os.path.realpath(fd) == str(REAL) for fd in Path("/proc/self/fd").iterdir())

    awake = Awake("on")
    awake.keep(True)
    awake.keep(True)
    assert asked() == 1
    assert REAL.read_bytes()[:4] == bytes(4), "the bound that is in force, of all who ask"
    awake.keep(False)
    assert asked() == 0
