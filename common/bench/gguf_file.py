"""Writes a GGUF file as a program: `python -m common.bench.gguf_file [CHECKPOINT FILE FORMAT]`, run
by the interpreter that has the rivals' packages. It prints a line of JSON after each tensor: bytes
done, and their total. Without arguments it only says whether it could.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common.bench.rivals.gguf import PACKAGES, write_gguf
from common.bench.rivals.program import ABSENT, absent
from common.errors import UserError


def main(arguments: list[str]) -> int:
    """The exit status: as of the rivals' programs."""
    if reason := absent(PACKAGES):
        print(json.dumps({"absent": reason}))
        return ABSENT
    if not arguments:
        return 0
    checkpoint, path, number_format = arguments
    try:
        write_gguf(Path(checkpoint), Path(path), number_format, _tell)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _tell(done: int, total: int) -> None:
    print(json.dumps({"done": done, "total": total}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
