"""Ctrl-C while an answer comes: the first cancels the answer, the second ends the command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from inflash._client import Generation


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    seen: bool = False


@contextlib.contextmanager
def cancel_on_interrupt(generation: Generation) -> Iterator[Interrupt]:
    """Within it, Ctrl-C asks the server to end `generation`, whose iterator then ends.

    A handler and not KeyboardInterrupt, which may strike between taking a message and keeping it.
    """
    interrupt = Interrupt()

    def cancel(*_: object) -> None:
        if interrupt.seen:
            raise KeyboardInterrupt
        interrupt.seen = True
        generation.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
