"""Threads that do a piece of work together with the one that asks for it, and sleep in between.

Work is jobs (common/jobs.py), which are done without Python's lock, from the waking on; or a
function of ours. Not a ThreadPoolExecutor: its futures and locks take 80 µs of a product of 1.4 ms,
queues 30 (docs/measurements.md).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from common.jobs import Job, Numbers, help_with, lead, listed

Work = Callable[[], None]
JOBS_MAX = 15  # at a time
_WORK = -1  # in the place of the number of jobs: a function of ours
_BYTE = b"\0"


class Team:
    """The asking thread and `helpers` more. One piece of work at a time."""

    def __init__(self, helpers: int, name: str) -> None:
        self._helpers = helpers
        self._jobs = np.zeros((1 + JOBS_MAX, 2), np.int64)
        self._work: deque[Work | None] = deque()
        self._failed: deque[BaseException] = deque()
        woken, self._wake = os.pipe()
        self._over, through = os.pipe()
        threads = []
        for _ in range(helpers):
            # Not the team: it ends when nobody has it any more.
            given = self._jobs, self._work, self._failed, woken, through
            threads.append(threading.Thread(target=_help, args=given, name=name, daemon=True))
            threads[-1].start()
        files = self._wake, woken, through, self._over
        weakref.finalize(self, _dismiss, self._jobs, self._work, threads, files)
        self.do([], helpers)  # what it takes is compiled, and they are there: no token waits for it

    def do(self, jobs: Sequence[Job], helpers: int) -> None:
        """So many helpers and the asking thread do `jobs`, at most JOBS_MAX, which share themselves
        out; returns when they are done."""
        made = listed(jobs)
        self._jobs[: len(made)] = made
        lead(self._jobs, self._wake, self._over, helpers)

    def call(self, work: Work) -> None:
        """All call `work`, which shares itself out; returns when all are through, and raises what
        one of them raised."""
        self._jobs[0, 0] = _WORK
        self._work.extend([work] * self._helpers)
        os.write(self._wake, _BYTE * self._helpers)
        try:
            work()
        finally:
            left = self._helpers
            while left:
                left -= len(os.read(self._over, left))
        if self._failed:
            failed = self._failed.popleft()
            self._failed.clear()
            raise failed


def _help(
    jobs: Numbers, given: deque[Work | None], failed: deque[BaseException], woken: int, through: int
) -> None:
    while True:
        help_with(jobs, woken, through)
        work = given.popleft()
        if work is None:
            return
        try:
            work()
        except BaseException as error:
            failed.append(error)
        del work  # and what it holds
        os.write(through, _BYTE)


def _dismiss(
    jobs: Numbers,
    given: deque[Work | None],
    threads: Sequence[threading.Thread],
    files: Sequence[int],
) -> None:
    jobs[0, 0] = _WORK
    given.extend([None] * len(threads))
    os.write(files[0], _BYTE * len(threads))
    # A thread that torch has run in aborts the process if it still lives when Python ends. None of
    # them is the current one: they let go of their work before they say that they are through.
    for thread in threads:
        thread.join()
    for file in files:
        os.close(file)
