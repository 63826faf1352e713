"""How far a prompt is, as a bar on stderr: for a terminal, and only once it has taken a while."""

from __future__ import annotations

import sys
import time
from typing import Any

from inflash._generation import Prefill

SHOW_AFTER_S = 1.0


class PrefillBar:
    """Call it with each Prefill; `end` takes the bar away. A context manager that ends it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._over = not sys.stderr.isatty()
        self._bar: Any = None

    def __call__(self, prefill: Prefill) -> None:
        if self._over or time.monotonic() - self._began < SHOW_AFTER_S:
            return
        if self._bar is None:
            self._begin()
        text = (
            f"{prefill.tokens_done:,} of {prefill.tokens:,} tokens,"
            f" layer {prefill.layers_done} of {prefill.layers}, {_time(prefill.eta_s)} left"
        )
        self._bar.update(self._task, completed=prefill.share, text=text)

    def _begin(self) -> None:
        from rich.console import Console  # 50 ms, for who waits a second
        from rich.progress import BarColumn, Progress, TextColumn

        columns = TextColumn("prompt"), BarColumn(30), TextColumn("{task.fields[text]}")
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=1.0, text="")
        self._bar.start()

    def end(self) -> None:
        """The answer begins, or there is none: the line is free again."""
        self._over = True
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> PrefillBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
