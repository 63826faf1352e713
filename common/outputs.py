"""What a command writes for its user: a place that cannot be written is told before the work, and
what the system refuses during it as a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

PICTURES = (".png", ".svg", ".pdf")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: Path) -> None:
    """`UserError` unless a file can be written at `path`. For before the work, which takes long."""
    folder = path.absolute().parent
    if not folder.is_dir():
        problem = f"there is no folder {folder}; make it, or choose another"
    elif path.is_dir():
        problem = "it is a folder; name a file in it"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "no permission, or the drive is read-only; choose another place"
    else:
        return
    raise UserError(f"{path} cannot be written: {problem}")


def check_picture(path: Path) -> None:
    """As `check_output`, of a file that is drawn: its suffix says how."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path} cannot be drawn: end its name in {', '.join(PICTURES)}")
    check_output(path)


@contextlib.contextmanager
def sentences(
    what: str, again: str = "run the same command again", kind: type[UserError] = UserError
) -> Iterator[None]:
    """What the operating system refuses (no room, no permission), as a sentence for the user.

    Args:
        what: the sentence's begin: what stopped, and where; a write that fails names no file.
        again: its end.
        kind: of the error that is raised.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in _FULL
        hint = "free some space" if full else "see that it is there and may be read and written"
        raise kind(f"{what}: {error.strerror or error}{where}; {hint}, and {again}") from None
