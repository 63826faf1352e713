"""Logs: one structlog logger per process. JSON lines in the run directory, text on a terminal.

    <run dir>/log/<service>.jsonl      one event per line: event, level, time, service, its fields
    <run dir>/log/<service>.jsonl.1    the events before, if there were more than LOG_BYTES_MAX

Events are nouns. Fields that every event has where it can: request, step, layer. What happens in
every layer is no event but a span: common/spans.py.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from common.limits import LOG_BYTES_MAX

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class LogFile:
    """A service's log on disk; for one thread at a time.

    The library's handler rotates it by size and survives a full disk: a log is no reason to end a
    service. It flushes what it is given: what a killed process had said is in the file.
    """

    def __init__(self, run_dir: Path, service: str):
        folder = run_dir / "log"
        folder.mkdir(mode=0o700, exist_ok=True)
        logging.raiseExceptions = False  # it would report a full disk on stderr, line by line
        self._json = structlog.processors.JSONRenderer()
        self._handler = RotatingFileHandler(
            folder / f"{service}.jsonl", maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8"
        )

    def append(self, event: EventDict) -> None:
        """Writes an event, a line."""
        line = str(self._json(None, "", event))
        self._handler.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        self._handler.close()


class Tail:
    """The lines that are added to a log from now on, through its rotation."""

    def __init__(self, path: Path):
        self._path = path
        self._rest = ""
        self._file: TextIO | None = None
        self._open(from_end=True)

    def read(self) -> list[str]:
        """The whole lines that are new."""
        lines: list[str] = []
        while True:
            if self._file is None and not self._open(from_end=False):
                return lines
            assert self._file is not None
            *whole, self._rest = (self._rest + self._file.read()).split("\n")
            lines += whole
            if not self._was_rotated():
                return lines
            *whole, self._rest = (self._rest + self._file.read()).split("\n")  # its very end
            lines += whole
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._rest = None, ""

    def _open(self, *, from_end: bool) -> bool:
        try:
            self._file = self._path.open(encoding="utf-8")
        except FileNotFoundError:
            return False
        if from_end:
            self._file.seek(0, os.SEEK_END)
        return True

    def _was_rotated(self) -> bool:
        assert self._file is not None
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False


def open_log(file: LogFile, service: str, level: str) -> FilteringBoundLogger:
    """A logger that appends to the service's file; a terminal on stderr gets what matters."""
    logger = structlog.wrap_logger(
        _Output(file, sys.stderr),
        processors=[_add_time, structlog.processors.format_exc_info, _add_level],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
    )
    bound: FilteringBoundLogger = logger.bind(service=service)
    return bound


def _add_time(_: Any, method: str, event: EventDict) -> EventDict:
    event["time"] = datetime.datetime.now(datetime.UTC).isoformat()
    return event


def _add_level(_: Any, method: str, event: EventDict) -> tuple[tuple[EventDict], dict[str, Any]]:
    event["level"] = method
    return (event,), {}


class _Output:
    """Writes each event to the file as JSON, and to the terminal, as text, what a person who
    watches a server wants to see: how bundles are read, and what is wrong."""

    SHOWN = frozenset({"backend", "refused", "vanished"})

    def __init__(self, file: LogFile, terminal: TextIO):
        self._file = file
        self._terminal = terminal if terminal.isatty() else None
        self._text = structlog.dev.ConsoleRenderer(colors=True)

    def _write(self, event: EventDict) -> None:
        self._file.append(event)
        if self._terminal and (event["event"] in self.SHOWN or event["level"] != "info"):
            shown = {k: v for k, v in event.items() if k not in ("time", "service")}
            shown |= {"timestamp": event["time"][11:19], "logger": event["service"]}
            self._terminal.write(f"{self._text(None, '', shown)!s}\n")

    debug = info = warning = error = critical = exception = msg = _write
