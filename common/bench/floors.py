"""Below what a token cannot fall on this machine: its reads at the drive's speed, its weights at
the memory's. Measured in the same run, by programs of their own, while nothing else runs.

    read_ms      bytes read for a token ÷ bytes that the drive gives in a second, in such reads
    compute_ms   bytes multiplied for a token ÷ bytes that the memory gives in a second

The bytes are those of the run that the floors are for. Reads and products can overlap wholly, so a
token's floor is the larger of the two; what overlap gained is measured against it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.bench.figures import Figures
from common.forecast.shapes import multiplied_bytes
from common.plan import kv_token_bytes
from common.store.geometry import DTYPE_BYTES
from common.store.store import Store


@dataclass(frozen=True)
class Touched:
    """Bytes that a token's products read from memory, each once."""

    resident: int  # attention, norms, head; of an embedding a token takes one row
    ffn: int  # the named neurons' first rows, and the other rows of those that fire
    kv: int

    @property
    def total(self) -> int:
        return self.resident + self.ffn + self.kv


def touched(store: Store, named: float, fired: float, context: float) -> Touched:
    """What a token touches.

    Args:
        named: neurons that are multiplied for a token, all layers.
        fired: of those, neurons whose other rows are multiplied, too.
        context: tokens that it attends to.
    """
    geometry = store.geometry
    computed = DTYPE_BYTES[geometry.compute_dtype]
    row_bytes = geometry.row_bytes
    config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
    return Touched(
        _resident_bytes(store) * computed // geometry.item_bytes,
        int((named + fired * (len(geometry.parts) - 1)) * row_bytes),
        int(context * kv_token_bytes(config, computed)),
    )


def _resident_bytes(store: Store) -> int:
    """Of the resident files, what every token multiplies."""
    return multiplied_bytes({name: t.nbytes for name, t in store.resident_tensors().items()})


def drive_bytes_per_s(points: Sequence[dict[str, Any]], read_bytes: float) -> float:
    """The drive's best for reads of a mean size: reads of the next smaller and the next larger
    size measured, mixed so that their mean is this one, each at the depth that suits it best."""
    sizes = sorted({point["read_bytes"] for point in points})
    best = [max(p["bytes_per_s"] for p in points if p["read_bytes"] <= size) for size in sizes]
    mean = min(max(read_bytes, sizes[0]), sizes[-1])
    return float(mean / np.interp(mean, sizes, np.divide(sizes, best)))


def make_floors(
    store: Store, figures: Figures, drive: dict[str, Any], memory: dict[str, Any]
) -> Figures:
    """The floors of inflash's `figures` (`summarise_inflash`), and all that they are made of.

    `drive` and `memory`: what `services/reader/measure.py` and `common/bench/memory.py` print.
    """
    read_bytes = figures["bytes_per_read"] or drive["stride_bytes"]
    drive_speed = drive_bytes_per_s(drive["points"], read_bytes)
    bytes_read = figures["bytes_per_token"]
    if bytes_read is None:
        bytes_read = figures["own_bytes_per_token"]
    parts = touched(
        store, figures["named_per_token"], figures["fired_per_token"], figures["context_tokens"]
    )
    return {
        "read_ms": 1e3 * bytes_read / drive_speed,
        "compute_ms": 1e3 * parts.total / memory["bytes_per_s"],
        "bytes_read_per_token": bytes_read,
        "bytes_per_read": read_bytes,
        "drive_bytes_per_s": drive_speed,
        "touched_bytes_per_token": asdict(parts) | {"total": parts.total},
        "memory_bytes_per_s": memory["bytes_per_s"],
        "memory_way": memory["way"],
        "memory": memory,
        "curve": drive["points"],
    }


def overlap_efficiency(serial_ms: float, measured_ms: float, floors: Figures) -> float | None:
    """How much of what overlap could save it saves: 1 is a token at the larger floor, 0 one that
    reads and computes in turn. None where there is nothing to save."""
    saved = serial_ms - max(floors["read_ms"], floors["compute_ms"])
    return (serial_ms - measured_ms) / saved if saved > 0 and math.isfinite(saved) else None
