"""Spans: what a process did, from when to when. The closed list, how they are kept, their file.

    <run dir>/log/<service>.spans      the spans of the server that ran here last
    <run dir>/log/<service>.spans.1    those before, if there were more than SPANS_BYTES_MAX

A file is a row of msgpack arrays, each written at once by the heart thread:

    [VERSION, wall_ns, monotonic_ns, [span, span, ...]]       both clocks, read together
    span: [name, request, step, layer, start_ns, ns, field, field, ...]

`start_ns` is `time.monotonic_ns()`, one clock for all processes of a machine; the fields are those
that SPANS lists. request, step and layer are -1 where there is none. A torn tail, which a process
that was killed leaves, is skipped.
"""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from common.limits import SPANS_BYTES_MAX, SPANS_MAX

VERSION = 1
NO_REQUEST = -1
NO_STEP = -1
NO_LAYER = -1

COUNTS = (
    "rows", "hits", "misses", "fired", "late_fired", "prefetched", "extra", "parts", "reads",
    "bytes_read", "wasted_bytes", "read_ns", "predictor_ns", "queue_ns", "flash_ns",
)  # fmt: skip
"""Fields of a `layer` span: LayerWaits' own (services/compute/waits.py)."""

SPANS: dict[str, dict[str, tuple[str, ...]]] = {
    "all": {
        # Of its loop's thread since the last: it ran cpu_ns, and was ready for delayed_ns more
        # in which it had no core, by the kernel's count.
        "beat": ("cpu_ns", "delayed_ns"),
    },
    "gateway": {
        "request": ("ordinal", "prompt_tokens", "new_tokens"),  # from arrival to its last word
        "queue": ("ordinal", "prompt_tokens"),  # from arrival until compute is given it
        "deliver": ("index",),  # a token: its text decoded, and sent to the client
    },
    "compute": {
        # From the token before, or the request's begin, until this one is sent; `delayed_ns`:
        # of that, ready to run and without a core, by the kernel's count.
        "token": ("index", "delayed_ns"),
        "step": ("rows",),  # one forward pass
        "admit": ("reused",),  # its place in the KV cache is made
        "others": (),  # what was done meanwhile was for other requests
        "embed": ("product_ns",),  # what comes before the first layer
        # From the FFN before to this layer's; `product_ns` is spent in products of matrices.
        "attention": ("product_ns",),
        "layer": COUNTS,  # its FFN, from Predict to the last Release
        "ask": (),  # Predict: made and sent
        "wait": ("part", "predictor_ns", "queue_ns", "flash_ns"),  # for a part
        "ffn": ("part", "neurons"),  # a part is multiplied
        "release": ("part",),  # its slots are given back
        "head": ("product_ns",),  # what comes after the last layer
        "sample": (),  # the token is chosen
        "send": (),  # Token, and a look at what the gateway says
    },
    "predictor": {
        "predict": ("rows", "named"),  # until the demand is sent
        "ahead": ("named",),  # for the layer after: `layer` is that one
    },
    "reader": {
        "fetch": ("prefetch", "named", "missing"),  # taken up, looked up, hits sent
        # A group's reads, from submit to the last; then its checksums took verify_ns. `part`: as
        # which compute gets it; -1: as no part of its own.
        "read": ("prefetch", "part", "neurons", "reads", "bytes", "verify_ns"),
    },
}
FIELDS = {name: fields for spans in SPANS.values() for name, fields in spans.items()}

Row = tuple[Any, ...]


class Span(NamedTuple):
    """One span as it was read: its fields in SPANS' order, and by name with `field`."""

    name: str
    request: int
    step: int
    layer: int
    start_ns: int
    ns: int
    fields: tuple[int, ...]

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.ns

    def field(self, name: str) -> int:
        return self.fields[FIELDS[self.name].index(name)]

    def named_fields(self) -> dict[str, int]:
        return dict(zip(FIELDS[self.name], self.fields, strict=True))


class Recorder:
    """A process's spans until they are written: a bounded queue that the heart thread empties."""

    def __init__(self) -> None:
        self.lost = 0  # of the oldest, which gave way: the heart did not keep up
        self._rows: collections.deque[Row] = collections.deque(maxlen=SPANS_MAX)

    def add(
        self,
        name: str,
        request: int,
        step: int,
        layer: int,
        start_ns: int,
        end_ns: int,
        *fields: int,
    ) -> None:
        """Keeps a span. Cheap: a tuple."""
        if len(self._rows) == SPANS_MAX:
            self.lost += 1
        self._rows.append((name, request, step, layer, start_ns, end_ns - start_ns, *fields))

    def take(self) -> list[Row]:
        """All that are kept, oldest first; they are kept no more."""
        return [self._rows.popleft() for _ in range(len(self._rows))]


class RunDelay:
    """What the kernel says of one thread: how long it ran, and waited for a core."""

    def __init__(self, thread: int):
        """`thread` is a native id of this process. Where the kernel does not count, all is 0."""
        try:
            path = f"/proc/self/task/{thread}/schedstat"
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        self._last = 0, 0
        self.take()

    def take(self) -> tuple[int, int]:
        """Nanoseconds since the last take: on a core, and ready without one."""
        if self._file < 0:
            return 0, 0
        cpu_ns, delayed_ns = map(int, os.pread(self._file, 64, 0).split()[:2])
        before, self._last = self._last, (cpu_ns, delayed_ns)
        return cpu_ns - before[0], delayed_ns - before[1]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SpanFile:
    """Where a service's spans go. For one thread at a time. A full disk is no reason to end."""

    def __init__(self, run_dir: Path, service: str):
        self._path = spans_path(run_dir, service)
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        for old in (self._path, earlier(self._path)):
            old.unlink(missing_ok=True)  # another server's

    def append(self, rows: Sequence[Row]) -> None:
        """Writes spans, at once."""
        if not rows:
            return
        now = time.time_ns(), time.monotonic_ns()
        data = msgpack.packb([VERSION, *now, rows])
        with contextlib.suppress(OSError), self._path.open("ab") as file:
            if file.tell() + len(data) > SPANS_BYTES_MAX:
                os.replace(self._path, earlier(self._path))
                self._path.write_bytes(data)
            else:
                file.write(data)


def spans_path(run_dir: Path, service: str) -> Path:
    return run_dir / "log" / f"{service}.spans"


def earlier(path: Path) -> Path:
    """Where a file's older half is."""
    return path.with_name(f"{path.name}.1")


class SpanReader:
    """Reads a service's spans as they are written: each call goes on where the last one ended."""

    def __init__(self, run_dir: Path, service: str):
        self.wall_minus_monotonic_ns: int | None = None
        self._path = spans_path(run_dir, service)
        self._file: Any = None
        self._inode = 0
        self._unpacker = _unpacker()

    def read(self) -> Iterator[Span]:
        """The spans that are new, oldest first."""
        if self._file is None and earlier(self._path).exists():
            with earlier(self._path).open("rb") as older:
                yield from self._spans(older.read(), _unpacker())
        while True:
            if self._file is None:
                try:
                    self._file = self._path.open("rb")
                except FileNotFoundError:
                    return
                self._inode, self._unpacker = os.fstat(self._file.fileno()).st_ino, _unpacker()
            yield from self._spans(self._file.read(), self._unpacker)
            if not self._was_replaced():
                return
            yield from self._spans(self._file.read(), self._unpacker)  # its very end
            self.close()

    def _was_replaced(self) -> bool:
        try:
            return self._path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False

    def _spans(self, data: bytes, unpacker: msgpack.Unpacker) -> Iterator[Span]:
        unpacker.feed(data)
        for version, wall_ns, monotonic_ns, rows in _records(unpacker):
            if version != VERSION:
                continue
            self.wall_minus_monotonic_ns = wall_ns - monotonic_ns
            for row in rows:
                if _is_whole(row):
                    name, request, step, layer, start_ns, ns, *fields = row
                    yield Span(name, request, step, layer, start_ns, ns, tuple(fields))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_spans(run_dir: Path, service: str) -> list[Span]:
    """All spans of a service that are on disk, oldest first."""
    reader = SpanReader(run_dir, service)
    try:
        return list(reader.read())
    finally:
        reader.close()


def _unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(use_list=False, max_buffer_size=2 * SPANS_BYTES_MAX)


def _records(unpacker: msgpack.Unpacker) -> Iterator[tuple[int, int, int, tuple[Row, ...]]]:
    """Whole records; nothing more of a file that is damaged."""
    try:
        for record in unpacker:
            if not isinstance(record, tuple) or [type(v) for v in record] != [int] * 3 + [tuple]:
                return
            yield record
    except (ValueError, msgpack.UnpackException):
        return


def _is_whole(row: Any) -> bool:
    """Whether this is a span of ours: one that is not comes of a damaged file."""
    if not isinstance(row, tuple) or not row or type(row[0]) is not str or row[0] not in FIELDS:
        return False
    return len(row) == 6 + len(FIELDS[row[0]]) and all(type(value) is int for value in row[1:])
