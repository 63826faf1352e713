"""A backend whose reads are late on purpose: the setting `slow` (common/slow.py)."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.slow import Slow
from services.reader.backends import Backend, Completion
from services.reader.reads import Reads


class Slowed:
    """A backend, of which every so many batches are told later than they are over. Meanwhile their
    slots are neither read nor given to others, as if the drive took so long."""

    def __init__(
        self, backend: Backend, slow: Slow, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = backend.name
        self.direct = backend.direct
        self._backend = backend
        self._slow = slow
        self._clock = clock
        self._batches = 0.0
        self._late: set[int] = set()  # tags
        self._held: list[tuple[float, Completion]] = []  # until when

    def submit(self, tag: int, file: int, reads: Reads) -> None:
        self._batches += self._slow.reads_share
        if self._batches >= 1:
            self._batches -= 1
            self._late.add(tag)
        self._backend.submit(tag, file, reads)

    def fileno(self) -> int:
        """What is held wakes nobody: the loop looks every RECHECK_S while reads are under way."""
        return self._backend.fileno()

    def completed(self) -> list[Completion]:
        now = self._clock()
        told = []
        for completion in self._backend.completed():
            if completion.tag in self._late:
                self._late.discard(completion.tag)
                self._held.append((now + self._slow.reads_s, completion))
            else:
                told.append(completion)
        told += [completion for until, completion in self._held if until <= now]
        self._held = [held for held in self._held if held[0] > now]
        return told

    def close(self) -> None:
        self._backend.close()
