"""Probes of this machine: programs of their own, one line of JSON each, while nothing else runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.launch import CHECKOUT


def measure_drive(where: Path, *options: str) -> dict[str, Any]:
    """What `services/reader/measure.py` prints of a store or a folder: reads as the reader makes
    them."""
    return _program("services.reader.measure", str(where.absolute()), *options)


def measure_memory(*options: str) -> dict[str, Any]:
    """What `common/bench/memory.py` prints."""
    return _program("common.bench.memory", *options)


def measure_products(*options: str) -> dict[str, Any]:
    """What `services/compute/speeds.py` prints."""
    return _program("services.compute.speeds", *options)


def measure_pipeline() -> dict[str, Any]:
    """What `common/forecast/pipeline.py` prints."""
    return _program("common.forecast.pipeline")


def _program(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(f"python -m {module} ended with status {done.returncode}: {why}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
