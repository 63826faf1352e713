"""Threads that do a piece of work together with the one that asks for it, and sleep in between.

Not a ThreadPoolExecutor: its futures and locks take 80 µs of a product of 1.4 ms, queues 30
(docs/measurements.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class Team:
    """The asking thread and `helpers` more. One piece of work at a time."""

    def __init__(self, helpers: int, name: str) -> None:
        self._inboxes: list[SimpleQueue[Work | None]] = [SimpleQueue() for _ in range(helpers)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        threads = []
        for inbox in self._inboxes:
            given = inbox, self._done  # not the team: it ends when nobody has it any more
            threads.append(threading.Thread(target=_help, args=given, name=name, daemon=True))
            threads[-1].start()
        weakref.finalize(self, _dismiss, self._inboxes, threads)

    def do(self, work: Work) -> None:
        """All call `work`, which shares itself out; returns when all are through, and raises what
        one of them raised."""
        for inbox in self._inboxes:
            inbox.put(work)
        failed: BaseException | None = None
        try:
            work()
        finally:
            for _ in self._inboxes:
                failed = self._done.get() or failed
        if failed is not None:
            raise failed


def _help(inbox: SimpleQueue[Work | None], done: SimpleQueue[BaseException | None]) -> None:
    while (work := inbox.get()) is not None:
        try:
            work()
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        del work  # and what it holds


def _dismiss(inboxes: list[SimpleQueue[Work | None]], threads: list[threading.Thread]) -> None:
    for inbox in inboxes:
        inbox.put(None)
    for thread in threads:
        # A thread that torch has run in aborts the process if it still lives when Python ends.
        if thread is not threading.current_thread():  # which may have let go of the team last
            thread.join()
