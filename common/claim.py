"""A process's place in the run directory: one holder at a time, found by others through its pid.

<run dir>/<name>.pid      locked by its holder; holds its process id
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from common.errors import UserError


def claim_path(run_dir: Path, name: str) -> Path:
    return run_dir / f"{name}.pid"


@contextlib.contextmanager
def claim(run_dir: Path, name: str) -> Iterator[None]:
    """Holds the place `name` in the run directory, which is made if it is missing, mode 0700.

    `UserError` if another process holds it, or the directory cannot be used.
    """
    path = claim_path(run_dir, name)
    try:
        _make_private(run_dir)
        file = _lock(path)
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be used: {error.strerror}; choose another"
            " --run-dir or INFLASH_RUN_DIR"
        ) from None
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _make_private(run_dir: Path) -> None:
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = run_dir.stat()
    if stat.st_uid != os.getuid():
        raise UserError(f"the run directory {run_dir} belongs to another user; choose --run-dir")
    if stat.st_mode & 0o077:
        run_dir.chmod(0o700)


def _lock(path: Path) -> TextIOWrapper:
    """The claim's file, locked. A holder unlinks it at its end, so the lock that was got may be on
    a file that is no more there: then the next one counts."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            file.close()
            raise UserError(
                f"{path.parent} is in use: its {path.stem} runs as process {holder};"
                " stop that server or choose another --run-dir"
            ) from None
