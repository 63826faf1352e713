"""What cannot be written is a sentence that says what, where, and what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import StoreError, UserError
from common.outputs import check_output, check_picture, sentences


def test_a_place_that_can_be_written_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_text("as it was")
    for name in ("old", "new"):
        check_output(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"
    monkeypatch.chdir(tmp_path)
    check_output(Path("here"))


def test_a_place_that_cannot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"b cannot be written: there is no folder .*/a; make it"):
        check_output(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="cannot be written: it is a folder"):
        check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write where others may not
    with pytest.raises(UserError, match=r"new cannot be written: .*read-only; choose another"):
        check_output(tmp_path / "new")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left"), "it stopped: No space left; free some space, and"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            r"it stopped: Permission denied \(/a/b\); see that it is there .*, and run",
        ),
        (OSError("of one word"), "it stopped: of one word; see"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(error: OSError, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"), sentences("it stopped"):
        raise error
    with pytest.raises(StoreError, match=r"and go on$"), sentences("it", "go on", StoreError):
        raise error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="a bug"), sentences("it stopped"):
        raise ValueError("a bug")


def test_a_picture_is_refused_by_its_suffix_before_the_work(tmp_path: Path) -> None:
    for name in ("a.png", "b.PDF", "c.svg"):
        check_picture(tmp_path / name)
    with pytest.raises(UserError, match=r"x\.foo cannot be drawn: end its name in \.png"):
        check_picture(tmp_path / "x.foo")
    with pytest.raises(UserError, match="there is no folder"):
        check_picture(tmp_path / "none" / "x.png")
