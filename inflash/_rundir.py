"""The run directory: where a server's sockets, claims and logs are, and how a client finds it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from inflash._errors import InflashError

SOCKET_PATH_MAX = 107
"""sockaddr_un holds 108 bytes with the closing zero; Linux's and the larger of the limits."""

CLIENT_LINK = "clients"


def default_run_dir() -> Path:
    """$INFLASH_RUN_DIR, or `inflash` in the user's runtime directory, or a private one in /tmp."""
    if chosen := os.environ.get("INFLASH_RUN_DIR"):
        return Path(chosen).expanduser().absolute()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "inflash"
    return Path(tempfile.gettempdir()) / f"inflash-{os.getuid()}"


def socket_path(run_dir: Path, link: str) -> Path:
    """The file of a link's socket."""
    return run_dir / f"{link}.ipc"


def endpoint(run_dir: Path, link: str) -> str:
    """The ZeroMQ address of a link; `InflashError` if the path is too long for a socket."""
    path = socket_path(run_dir, link)
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise InflashError(
            f"the run directory's path is too long for a socket: {path}"
            f" ({len(os.fsencode(path))} bytes, at most {SOCKET_PATH_MAX}); choose a shorter"
            " --run-dir or INFLASH_RUN_DIR"
        )
    return f"ipc://{path}"
