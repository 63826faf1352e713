"""Spans on disk: what was recorded is read again, whole, in order, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import spans
from common.spans import FIELDS, SPANS, Recorder, Span, SpanFile, SpanReader, earlier, read_spans


def rows(first: int, count: int) -> list[spans.Row]:
    return [("ffn", 7, 1, 2, ns, 10, 0, 64) for ns in range(first, first + count)]


def test_what_is_recorded_is_read() -> None:
    recorder = Recorder()
    recorder.add("wait", 7, 1, 2, 100, 160, 1, 10, 20, 30)
    assert recorder.take() == [("wait", 7, 1, 2, 100, 60, 1, 10, 20, 30)]
    assert recorder.take() == []


def test_a_recorder_that_nobody_empties_is_bounded_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "SPANS_MAX", 3)
    recorder = Recorder()
    for ns in range(5):
        recorder.add("sample", 7, 1, -1, ns, ns + 1)
    assert recorder.lost == 2
    assert [row[4] for row in recorder.take()] == [2, 3, 4]


def test_a_file_is_read_as_it_grows(tmp_path: Path) -> None:
    file, reader = SpanFile(tmp_path, "compute"), SpanReader(tmp_path, "compute")
    assert list(reader.read()) == []
    file.append(rows(0, 2))
    assert [span.start_ns for span in reader.read()] == [0, 1]
    file.append(rows(2, 1))
    (span,) = reader.read()
    assert span == Span("ffn", 7, 1, 2, 2, 10, (0, 64))
    assert (span.end_ns, span.field("neurons")) == (12, 64)
    assert span.named_fields() == {"part": 0, "neurons": 64}
    assert reader.wall_minus_monotonic_ns is not None
    reader.close()


def test_files_are_bounded_and_a_reader_follows_through_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "SPANS_BYTES_MAX", 2000)
    file, reader = SpanFile(tmp_path, "compute"), SpanReader(tmp_path, "compute")
    seen: list[int] = []
    for first in range(0, 1000, 10):
        file.append(rows(first, 10))
        seen += [span.start_ns for span in reader.read()]
    assert seen == list(range(1000))
    path = spans.spans_path(tmp_path, "compute")
    assert path.stat().st_size <= 2000
    assert earlier(path).stat().st_size <= 2000
    kept = [span.start_ns for span in read_spans(tmp_path, "compute")]
    assert kept == list(range(kept[0], 1000))
    reader.close()


def test_a_new_server_begins_anew(tmp_path: Path) -> None:
    SpanFile(tmp_path, "reader").append(rows(0, 2))
    SpanFile(tmp_path, "reader").append(rows(5, 1))
    assert [span.start_ns for span in read_spans(tmp_path, "reader")] == [5]


@pytest.mark.parametrize("damage", [b"\x94\x01\x02", b"\xc1", b"\x05", b"\x94\x01\x02\x03\x91\x01"])
def test_a_torn_tail_is_skipped(tmp_path: Path, damage: bytes) -> None:
    SpanFile(tmp_path, "reader").append(rows(0, 2))
    with spans.spans_path(tmp_path, "reader").open("ab") as file:
        file.write(damage)
    assert len(read_spans(tmp_path, "reader")) == 2


def test_names_are_of_one_service_each() -> None:
    assert len(FIELDS) == sum(len(names) for names in SPANS.values())
