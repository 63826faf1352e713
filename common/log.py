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
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from common.limits import LOG_BYTES_MAX

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def open_log(run_dir: Path, service: str, level: str) -> FilteringBoundLogger:
    """A logger that appends to the service's file; a terminal on stderr gets what matters."""
    logging.raiseExceptions = False  # the handler would report a full disk on stderr, per line
    folder = run_dir / "log"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Every line is flushed: what a killed process had said is in the file. The library's handler
    # also survives a full disk: a log is no reason to end a service.
    file = RotatingFileHandler(
        folder / f"{service}.jsonl", maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8"
    )
    wrapper = structlog.make_filtering_bound_logger(LEVELS[level])
    logger = structlog.wrap_logger(
        _Output(file, sys.stderr),
        processors=[_add_time, structlog.processors.format_exc_info, _add_level],
        wrapper_class=wrapper,
    )
    bound: FilteringBoundLogger = logger.bind(service=service)
    return bound


def _add_time(_: Any, method: str, event: EventDict) -> EventDict:
    """The time of the event, which may have been noted before it is written."""
    seconds = event.pop("time", None) or time.time()
    event["time"] = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    return event


def _add_level(_: Any, method: str, event: EventDict) -> tuple[tuple[EventDict], dict[str, Any]]:
    event["level"] = method
    return (event,), {}


class _Output:
    """Writes each event to the file as JSON, and to the terminal, as text, what a person who
    watches a server wants to see: how bundles are read, requests that ended, and what is wrong."""

    SHOWN = frozenset({"backend", "finished", "refused", "vanished"})

    def __init__(self, file: RotatingFileHandler, terminal: TextIO):
        self._file = file
        self._terminal = terminal if terminal.isatty() else None
        self._json = structlog.processors.JSONRenderer()
        self._text = structlog.dev.ConsoleRenderer(colors=True)

    def _write(self, event: EventDict) -> None:
        line = f"{self._json(None, '', event)!s}"
        self._file.handle(logging.makeLogRecord({"msg": line}))
        if self._terminal and (event["event"] in self.SHOWN or event["level"] != "info"):
            shown = {k: v for k, v in event.items() if k not in ("time", "service")}
            shown |= {"timestamp": event["time"][11:19], "logger": event["service"]}
            self._terminal.write(f"{self._text(None, '', shown)!s}\n")

    debug = info = warning = error = critical = exception = msg = _write
