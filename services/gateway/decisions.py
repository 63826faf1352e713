"""What the gateway's pure modules decide; its loop does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import messages


@dataclass(frozen=True, slots=True)
class ToClient:
    client: bytes  # the routing id of its connection
    message: Any


@dataclass(frozen=True, slots=True)
class ToCompute:
    message: messages.Admit | messages.Abort


@dataclass(frozen=True, slots=True)
class Noted:
    """An event for the log."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Traced:
    """A span for the trace. Times are seconds of the loop's clock."""

    name: str
    request: int
    start: float
    end: float
    fields: tuple[int, ...]


Decision = ToClient | ToCompute | Noted | Traced
