"""A log that is followed: every line once, through its rotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import log
from common.log import LogFile, Tail


def test_a_tail_has_what_is_added_through_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LOG_BYTES_MAX", 400)
    file = LogFile(tmp_path, "gateway")
    file.append({"event": "before"})
    tail = Tail(tmp_path / "log" / "gateway.jsonl")
    seen: list[str] = []
    for number in range(100):
        file.append({"event": "one", "number": number})
        seen += tail.read()
    assert seen == [f'{{"event": "one", "number": {number}}}' for number in range(100)]
    tail.close()
    file.close()


def test_a_tail_of_what_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text("one\ntw")
    assert tail.read() == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert tail.read() == ["two"]
    tail.close()
