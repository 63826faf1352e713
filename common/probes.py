"""Probes of this machine: programs of their own, one line of JSON each, while nothing else runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.launch import CHECKOUT
from common.limits import STOP_S

END_S = 2 * STOP_S  # after a Ctrl-C; then it is killed


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
    """Runs a program in a session of its own, so that a Ctrl-C reaches it once, and by us: it has
    a server to end and files to take away."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode:
        why = (err.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(f"python -m {module} ended with status {process.returncode}: {why}")
    found: dict[str, Any] = json.loads(out)
    return found
