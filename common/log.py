"""Logs: one structlog logger per process. JSON lines in the run directory, text on a terminal.

    <run dir>/log/<service>.jsonl      one event per line: event, level, time, service, its fields
    <run dir>/log/<service>.jsonl.1    the events before, if there were more than LOG_BYTES_MAX

Events are nouns. Fields that every event has where it can: request, step, layer.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from common.limits import LOG_BYTES_MAX

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

Note = tuple[float, str, dict[str, Any]]
"""A frequent event, kept to be written later: time in seconds, name, fields."""


class LogFile:
    """A service's log on disk; for one thread at a time.

    The library's handler rotates it by size and survives a full disk: a log is no reason to end a
    service. It flushes what it is given: what a killed process had said is in the file.
    """

    def __init__(self, run_dir: Path, service: str):
        folder = run_dir / "log"
        folder.mkdir(mode=0o700, exist_ok=True)
        logging.raiseExceptions = False  # it would report a full disk on stderr, line by line
        self._service = service
        self._json = structlog.processors.JSONRenderer()
        self._handler = RotatingFileHandler(
            folder / f"{service}.jsonl", maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8"
        )

    def append(self, *events: EventDict) -> None:
        """Writes events, a line each, all at once."""
        lines = "\n".join(str(self._json(None, "", event)) for event in events)
        self._handler.handle(logging.makeLogRecord({"msg": lines}))

    def append_notes(self, notes: Iterable[Note]) -> None:
        """Writes frequent events that were noted before."""
        common = {"service": self._service, "level": "info"}
        events = [
            {"event": name, "time": _iso(seconds), **common, **fields}
            for seconds, name, fields in notes
        ]
        if events:
            self.append(*events)

    def close(self) -> None:
        self._handler.close()


def open_log(file: LogFile, service: str, level: str) -> FilteringBoundLogger:
    """A logger that appends to the service's file; a terminal on stderr gets what matters."""
    logger = structlog.wrap_logger(
        _Output(file, sys.stderr),
        processors=[_add_time, structlog.processors.format_exc_info, _add_level],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
    )
    bound: FilteringBoundLogger = logger.bind(service=service)
    return bound


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _add_time(_: Any, method: str, event: EventDict) -> EventDict:
    event["time"] = _iso(time.time())
    return event


def _add_level(_: Any, method: str, event: EventDict) -> tuple[tuple[EventDict], dict[str, Any]]:
    event["level"] = method
    return (event,), {}


class _Output:
    """Writes each event to the file as JSON, and to the terminal, as text, what a person who
    watches a server wants to see: how bundles are read, requests that ended, and what is wrong."""

    SHOWN = frozenset({"backend", "finished", "refused", "vanished"})

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
