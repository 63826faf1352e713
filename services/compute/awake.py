"""Keeps the cores from halting while requests run.

Cores wait between products: for a message, for flash. A virtual core that waits halts, and it is
its host that wakes it. Under a bound of 0 µs on how long waking may take (Linux, Documentation/
power/pm_qos_interface.rst) a core that waits polls instead, until the file is closed, be it by the
process's end. That costs power, and gains where it was measured: docs/measurements.md, "Cores that
halt".
"""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError
from common.system import ROOT, VIRTUAL, idle_driver

LATENCY = "dev/cpu_dma_latency"
_NO_US = bytes(4)  # int32


class Awake:
    """The setting `awake`, in force."""

    def __init__(self, setting: str, root: Path = ROOT) -> None:
        """`setting` is auto, on or off; `UserError` if "on" cannot be had."""
        self._path = root / LATENCY
        self._file: int | None = None
        self._may, self.reason = self._choose(setting, root)
        """Why cores are kept from halting, or not: a sentence."""

    def keep(self, wanted: bool) -> None:
        """From now on, or no more."""
        if wanted and self._may and self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._file, _NO_US)
        elif not wanted and self._file is not None:
            os.close(self._file)
            self._file = None

    def _choose(self, setting: str, root: Path) -> tuple[bool, str]:
        if setting == "off":
            return False, "cores halt as they like: awake is off"
        if setting == "auto" and idle_driver(root) != VIRTUAL:
            return False, f"cores halt as they like: they are not driven by {VIRTUAL}"
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            if setting == "on":
                raise UserError(
                    f"INFLASH_AWAKE: on, but {self._path} cannot be written ({error.strerror}): on"
                    " Linux that takes root, or a rule of udev; INFLASH_AWAKE=auto goes without"
                ) from None
            return False, f"cores halt as they like: {self._path}: {error.strerror}"
        return True, "cores do not halt while a request runs"
