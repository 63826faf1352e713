"""Commands that run from a checkout: `inflash convert ...` becomes `python -m scripts.convert ...`.

The wheel is the client; stores are made and served by the code beside this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from inflash._errors import InflashError

COMMANDS = {
    "doctor": "Measure this machine: drive, memory, cores, limits.",
    "plan": "Foretell fit and speed of a model, before it is downloaded.",
    "convert": "Make a store of a Hugging Face checkpoint.",
    "verify": "Check every byte of a store against its checksums.",
    "fit": "Fit predictors for a store, from any text.",
    "serve": "Start a server for a store.",
    "trace": "Say where each token's time went, and what bounds a run.",
    "compare": "Prove that a store answers as its checkpoint does.",
    "eval": "Measure what fitted predictors cost in accuracy and save in bytes.",
    "bench": "Measure inflash beside others, on a checkpoint that it makes.",
}
"""What scripts/ has, and the line that `inflash --help` shows for it."""


def find_checkout() -> Path | None:
    """The checkout that this package is part of, or None if it was installed without."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "services").is_dir() and (root / "scripts").is_dir() else None


def run_script(name: str, arguments: Sequence[str]) -> NoReturn:
    """Becomes the script `name`; `InflashError` if there is no checkout."""
    checkout = find_checkout()
    if checkout is None:
        raise InflashError(
            f"`inflash {name}` runs from a checkout, and this inflash is the installed client;"
            " clone inflash's repository, run its ./scripts/demo once to set it up, then"
            f" `.venv/bin/inflash {name}` there"
        )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    # -P: a folder `scripts` in the current directory is not ours.
    command = [sys.executable, "-P", "-m", f"scripts.{name}", *arguments]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})
