"""The doctor's sentences, and what it reads of a system: a folder that looks like one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from common.forecast.advice import sentences, warnings
from common.forecast.machine import Drive
from common.system import (
    DriveFacts,
    Limits,
    core_cache_bytes,
    facts_of,
    first_cache_bytes,
    limits,
    swap_written_bytes,
)
from tests.unit.test_forecast import MACHINE

GB = 10**9
HEALTHY = DriveFacts("nvme0n1", "A Drive", False, 10, 5, 41.0, 84.0, 3)
ROOMY = Limits(24 * GB, False, None, 20_000, 65_536, 0, 24 * GB, 24 * GB, 0)


def said(facts: DriveFacts | None = HEALTHY, own: Limits = ROOMY, swapped: int | None = 0,
         **machine: Any) -> str:  # fmt: skip
    return "\n".join(sentences(dataclasses.replace(MACHINE, **machine), facts, own, swapped))


def test_a_healthy_machine_gets_no_warning() -> None:
    assert warnings(HEALTHY, ROOMY, 0) == []
    assert warnings(None, ROOMY, None) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_limited": True, "memory_bytes": 7 * GB}, "A cgroup allows 7.0 GB"),
        ({"shm_free_bytes": 64_000_000}, "/dev/shm, where the cache lies, has 64.0 MB free"),
        ({"aio_events_max": 100}, "fs.aio-max-nr"),
        ({"open_files": 256}, "ulimit -n"),
    ],
)
def test_limits_are_warned_of(change: dict[str, Any], words: str) -> None:
    own = dataclasses.replace(ROOMY, **change)
    assert words in said(own=own)
    assert any(words in sentence for sentence in warnings(HEALTHY, own, 0))


def test_swap_that_was_written_is_warned_of() -> None:
    own = dataclasses.replace(ROOMY, swap_bytes=2 * GB)
    assert "Warning: 5.0 MB were written to swap" in said(own=own, swapped=5_000_000)
    assert "nothing was written to it" in said(own=own)
    assert "swap" not in said()


def test_a_hot_or_worn_drive_is_told() -> None:
    assert "82 °C" in said(dataclasses.replace(HEALTHY, temperature_c=82.0))
    assert "90 %" in said(dataclasses.replace(HEALTHY, wear_percent=90))
    assert "°C" not in said()


def test_the_way_of_reading_is_the_readers_and_a_faster_one_is_named() -> None:
    ways = {"aio": 0.3e9, "threads": 0.6e9, "buffered": 0.2e9}
    text = said(drive=dataclasses.replace(MACHINE.drive, ways=ways))
    assert "Bundles will be read directly and asynchronously" in text
    assert "--backend threads" in text
    text = said(drive=dataclasses.replace(MACHINE.drive, ways=ways | {"aio": "Invalid argument"}))
    assert "Bundles will be read directly, by threads" in text
    assert "cannot be read directly and asynchronously (io_submit): Invalid argument" in text


def test_slow_half_precision_is_told() -> None:
    assert "no fast half precision" not in said()
    half = {"resident": 4e9, "named": 5e9, "fired": 8e9, "context": 4e9}
    assert "no fast half precision" in said(decode={**MACHINE.decode, "float16": half})
    block = {**MACHINE.block, "float16": {"resident": [2e-9, 3e-8], "ffn": [1e-9, 4e-9]}}
    assert "A prompt of a float16 model takes 7.5 times as long" in said(block=block)


def test_a_drive_that_its_model_does_not_fit_is_told() -> None:
    drive = Drive("x", 10.0, 1.0, 0.6, None, (), {})
    assert "off by 60%" in said(drive=drive)


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_drive_is_read_from_its_folder(tmp_path: Path) -> None:
    stat = " ".join(f"{n}" for n in range(1, 18))
    nvme = make(tmp_path / "nvme0n1", {
        "stat": stat, "queue/rotational": "0\n", "device/model": "A Drive  \n",
        "device/hwmon2/temp1_input": "41850\n", "device/hwmon2/temp1_max": "81850\n",
    })  # fmt: skip
    found = facts_of(nvme)
    assert found == DriveFacts("nvme0n1", "A Drive", False, 3 * 512, 7 * 512, 41.85, 81.85, None)
    card = make(tmp_path / "mmcblk0", {"device/life_time": "0x02 0x03\n", "device/name": "CARD"})
    assert (facts_of(card).wear_percent, facts_of(card).model) == (30, "CARD")
    bare = make(tmp_path / "vda", {"stat": ""})
    assert facts_of(bare) == DriveFacts("vda", None, None, None, None, None, None, None)


def test_limits_of_a_system(tmp_path: Path) -> None:
    root = make(tmp_path, {
        "proc/vmstat": "nr_free 5\npswpin 1\npswpout 7\n", "dev/shm/x": "",
        "proc/sys/fs/aio-max-nr": "65536\n", "proc/sys/fs/aio-nr": "128\n",
        "proc/swaps": "Filename Type Size Used Priority\n/swap file 1024 0 -2\n",
        **{f"sys/devices/system/cpu/cpu0/cache/index{n}/{name}": f"{said}\n"
           for n, kind, size in ((0, "Instruction", "64K"), (1, "Data", "48K"))
           for name, said in (("level", 1), ("type", kind), ("size", size))},
        "sys/devices/system/cpu/cpu0/cache/index3/size": "16384K\n",
    })  # fmt: skip
    found = limits(root)
    assert (found.aio_events_max, found.aio_events_used) == (65536, 128)
    assert found.swap_bytes == 1 << 20
    assert found.shm_bytes
    assert not found.memory_limited
    assert swap_written_bytes(root) == 7 * 4096
    assert core_cache_bytes(root) == 16 << 20
    assert first_cache_bytes(root) == 48 << 10
    empty = make(tmp_path / "other", {"x": ""})
    assert swap_written_bytes(empty) is None
    assert limits(empty).aio_events_max is None
    assert core_cache_bytes(empty) is None
    assert first_cache_bytes(empty) is None
