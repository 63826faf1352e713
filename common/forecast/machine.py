"""This machine's cost model: what `inflash doctor` writes and `inflash plan` foretells from.

    RUN_DIR/machine.json     one object, the fields of `Machine`

A read of so many bytes costs the drive `read_us + bytes × byte_ns`, at the reader's queue depth.
Refuses a file that is none of these; another machine's serves as well, if it is what is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import parse_size
from common.errors import UserError
from common.limits import ALIGN_BYTES, READ_BYTES_MAX

VERSION = 1
FILE = "machine.json"  # in a run directory

_SHEET = re.compile(r"^(?P<speed>[\d.]+\s*[kmgt]i?b)/s(@(?P<reads>\d+)k?)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Drive:
    """What reads cost."""

    source: str  # where it was measured, or what a data sheet says
    read_us: float  # of one read, whatever its size, with others in flight
    byte_ns: float
    error: float  # largest relative error of the two over `points`; 0 of a data sheet
    latency_us: float | None  # of one read alone
    points: tuple[Mapping[str, float], ...]  # read_bytes, depth, bytes_per_s
    ways: Mapping[str, Any]  # bytes per second, or why it was refused, of each way of reading

    def seconds(self, reads: float, read_bytes: float) -> float:
        """Time for so many reads of a size."""
        return reads * (self.read_us * 1e-6 + read_bytes * self.byte_ns * 1e-9)

    @property
    def bytes_per_s(self) -> float:
        """Of the largest reads."""
        return READ_BYTES_MAX / self.seconds(1, READ_BYTES_MAX)


@dataclass(frozen=True)
class Machine:
    """A machine's cost model."""

    version: int
    host: str
    made: str  # when, in ISO's form
    processor: str
    cores: int
    memory_bytes: int  # that the tightest cgroup allows
    memory_bytes_per_s: float  # of the fastest product, on all cores
    memory_way: str
    threads: int  # of compute
    decode: Mapping[str, Mapping[str, float]]  # services/compute/speeds.py
    block: Mapping[str, Mapping[str, Sequence[float]]]
    block_rows: Sequence[int]
    predictor_bytes_per_s: float  # of int8 factors
    layer_ms: float  # common/forecast/pipeline.py
    named_per_layer: float
    start_s: float
    drive: Drive

    def as_object(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def block_seconds(self, dtype: str, kind: str, rows: int) -> float:
        """Seconds per byte of a block of `rows` tokens: linear between what was measured."""
        few, many = self.block_rows
        at_few, at_many = self.block[dtype][kind]
        slope = max((at_many - at_few) / (many - few), 0.0)
        return max(at_few + slope * (rows - few), at_few * 0.5)


def fit_drive(found: Mapping[str, Any], latency_us: float | None, source: str) -> Drive:
    """The cost of a read from what `services/reader/measure.py` printed: of the largest depth that
    was measured, least squares of the relative error."""
    points = found["points"]
    deepest = max(point["depth"] for point in points)
    chosen = [point for point in points if point["depth"] == deepest]
    sizes = np.array([point["read_bytes"] for point in chosen], np.float64)
    times = sizes / np.array([point["bytes_per_s"] for point in chosen])
    read, byte = _positive_line(sizes, times)
    error = float(np.max(np.abs((read + byte * sizes) / times - 1)))
    return Drive(source, read * 1e6, byte * 1e9, error, latency_us, tuple(points),
                 found.get("ways", {}))  # fmt: skip


def _positive_line(sizes: Any, times: Any) -> tuple[float, float]:
    """a and b of a + b × size: neither below 0."""
    weighted = np.stack([1 / times, sizes / times], axis=1)
    (read, byte), *_ = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)
    if read < 0:  # speed alone
        return 0.0, float(1 / np.mean(sizes / times))
    if byte < 0:
        return float(1 / np.mean(1 / times)), 0.0
    return float(read), float(byte)


def drive_of_sheet(text: str) -> Drive | None:
    """A drive as its data sheet has it, "3.5GB/s@600k": bytes per second of large reads, and reads
    per second of 4 KiB. None if `text` is nothing of the kind."""
    match = _SHEET.match(text.strip())
    if match is None:
        return None
    speed = parse_size(match["speed"])
    if not speed:
        return None
    byte_s = 1 / speed
    reads = int(match["reads"] or 0) * (1000 if text.strip().lower().endswith("k") else 1)
    read_s = max(1 / reads - ALIGN_BYTES * byte_s, 0.0) if reads else 0.0
    return Drive(f"data sheet: {text.strip()}", read_s * 1e6, byte_s * 1e9, 0.0, None, (), {})


def load_machine(path: Path) -> Machine:
    """What `inflash doctor` wrote; `UserError` says why it is none."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, and this reads {VERSION}")
        drive = Drive(**content.pop("drive"))
        machine = Machine(**content, drive=dataclasses.replace(drive, points=tuple(drive.points)))
        _check(machine)
    except FileNotFoundError:
        raise UserError(f"there is no cost model at {path}: `inflash doctor` writes one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no machine's cost model: {error}; `inflash doctor` writes one"
        ) from None
    return machine


def _check(machine: Machine) -> None:
    numbers = {
        "cores": machine.cores, "memory_bytes": machine.memory_bytes, "layer_ms": machine.layer_ms,
        "memory_bytes_per_s": machine.memory_bytes_per_s,
        "predictor_bytes_per_s": machine.predictor_bytes_per_s, "start_s": machine.start_s,
    }  # fmt: skip
    for dtype, products in machine.decode.items():
        numbers |= {f"decode {dtype} {name}": speed for name, speed in products.items()}
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} is {number!r}")
    for name in ("read_us", "byte_ns"):
        if not getattr(machine.drive, name) >= 0:
            raise ValueError(f"the drive's {name} is {getattr(machine.drive, name)!r}")
    if not machine.drive.seconds(1, READ_BYTES_MAX) > 0:
        raise ValueError("its drive reads in no time")


def with_drive(machine: Machine, profile: str) -> Machine:
    """`machine` with another drive: a data sheet's, or that of another machine's file."""
    drive = drive_of_sheet(profile)
    if drive is None:
        path = Path(profile).expanduser()
        if not path.exists():
            raise UserError(
                f"there is no drive {profile!r}: give a file that `inflash doctor` wrote, or a data"
                " sheet's speed and 4 KiB reads per second, as 3.5GB/s@600k"
            )
        drive = load_machine(path).drive
    return dataclasses.replace(machine, drive=drive)
