"""The doctor's probes, one after another, and the cost model that they make.

Each is a program of its own (common/probes.py) but two that take no time: one read at a time, and
the products of a predictor.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import probes
from common.forecast.machine import VERSION, Machine, fit_drive
from common.lowrank import Int8Tall
from common.system import cores, limits, processor

STAGES = ("drive", "memory", "products", "predictor", "processes")
DRIVE_SECONDS = 0.3  # for each size and depth
DRIVE_ROUNDS = 3
DEPTHS = (8, 32, 128)
PREDICTOR_SHAPE = (16384, 128)  # of a layer of 6.7 billion parameters
PREDICTOR_TURNS = 7


def probe(where: Path, tell: Callable[[str], None] = lambda stage: None) -> Machine:
    """Measures this machine, with the drive of `where`, a store or a folder. `UserError`.

    `tell` is told each of STAGES when it begins.
    """
    tell("drive")
    drive = _drive(where)
    tell("memory")
    memory = probes.measure_memory()
    tell("products")
    threads = cores()
    speeds = probes.measure_products("--threads", f"{threads}")
    tell("predictor")
    predictor = _predictor_bytes_per_s()
    tell("processes")
    pipeline = probes.measure_pipeline()
    return Machine(
        version=VERSION,
        host=platform.node(),
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        processor=processor(),
        cores=cores(),
        memory_bytes=limits().memory_bytes,
        memory_bytes_per_s=memory["bytes_per_s"],
        memory_way=memory["way"],
        threads=threads,
        decode=speeds["decode"],
        block=speeds["block"],
        block_rows=speeds["block_rows"],
        predictor_bytes_per_s=predictor,
        layer_ms=pipeline["layer_ms"],
        named_per_layer=pipeline["named_per_layer"],
        start_s=pipeline["start_s"],
        drive=drive,
    )


def _drive(where: Path) -> Any:
    depths = [option for depth in DEPTHS for option in ("--depth", f"{depth}")]
    rounds = [f"{DRIVE_ROUNDS}", "--seconds", f"{DRIVE_SECONDS / DRIVE_ROUNDS}"]
    found = probes.measure_drive(where, *depths, "--ways", "--latency", "--rounds", *rounds)
    return fit_drive(found, found["latency_us"], str(where.absolute()))


def _predictor_bytes_per_s() -> float:
    random = np.random.default_rng(0)
    rows = Int8Tall.of(random.standard_normal(PREDICTOR_SHAPE, np.float32))
    x = random.standard_normal((1, PREDICTOR_SHAPE[1]), np.float32)
    times = []
    for _ in range(PREDICTOR_TURNS):
        began = time.perf_counter()
        rows.dot(x)
        times.append(time.perf_counter() - began)
    return float(rows.values.nbytes / np.median(times))
