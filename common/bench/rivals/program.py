"""What the rivals' programs share: their arguments, one way to time a token, one line of JSON.

A token is one step of greedy decoding: ids go to the rival, an id comes back, and the time between
is all that it did. No torch here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

ABSENT = 3  # status of a program whose packages are not installed

Packages = Mapping[str, str]
"""Modules that a rival imports, each with what pip calls its package."""

Step = Callable[[list[int]], int]
"""Appends ids to what the model has seen, and returns the likeliest next one."""


class AbsentError(UserError):
    """A rival's package is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Options:
    """A rival's arguments."""

    model: Path
    prompt: list[int]
    tokens: int  # to decode and time, after the one that the prompt gives
    threads: int
    own: argparse.Namespace  # those that only this rival has

    @property
    def context(self) -> int:
        """Tokens that the model will have seen."""
        return len(self.prompt) + self.tokens


@dataclass(frozen=True)
class Timed:
    """What decoding took, prefill apart. Bytes and faults are those of the decoded tokens alone."""

    prefill_ms: float
    ms_per_token: list[float]
    bytes_read: int | None  # from the drive; None: the system does not say
    major_faults: int  # pages of a mapped file that had to be read
    tokens: list[int]  # the prompt's one, then those that were timed


@dataclass(frozen=True)
class Result:
    """What a rival's program prints."""

    name: str
    version: str
    load_ms: float
    timed: Timed
    note: str  # what a reader of the figures has to know

    def to_json(self) -> str:
        """One line: the fields of `timed` beside the others."""
        fields = dataclasses.asdict(self)
        return json.dumps(fields | fields.pop("timed"))


def absent(packages: Packages) -> str | None:
    """None if this interpreter has the packages; else a sentence that says what to install."""
    missing = [name for module, name in packages.items() if not importlib.util.find_spec(module)]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install {' '.join(missing)}"


def load(module: str, packages: Packages) -> Any:
    """Imports an optional module of `packages`; `AbsentError` if one of them is not installed."""
    if reason := absent(packages):
        raise AbsentError(reason)
    return importlib.import_module(module)


def command(rival: str, *arguments: str | Path | int, python: str = sys.executable) -> list[str]:
    """What starts a rival's program; from the checkout's root. `python` has the packages."""
    return [python, "-m", f"common.bench.rivals.{rival}", *map(str, arguments)]


def read_result(stdout: str) -> dict[str, Any] | None:
    """What a rival's program printed: `Result` as a dictionary, or {"absent": sentence}; None if it
    ended before it could."""
    lines = stdout.splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):  # killed, or a library had the last word
        return None
    return result if isinstance(result, dict) else None


def main(
    contend: Callable[[Options], Result],
    packages: Packages,
    arguments: Sequence[str],
    add_own: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """A rival's program: parses `arguments`, contends, prints. Returns the exit status.

    `add_own` adds the arguments that only this rival has. A user's mistake is a sentence on
    standard error and status 1.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=_positive, required=True)
    parser.add_argument("--prompt-ids-file", type=Path, required=True)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1)
    add_own(parser)
    own = parser.parse_args(arguments)
    try:
        if reason := absent(packages):
            raise AbsentError(reason)
        prompt = _read_prompt(own.prompt_ids_file)
        print(contend(Options(own.model, prompt, own.tokens, own.threads, own)).to_json())
    except AbsentError as error:
        print(json.dumps({"absent": str(error)}))
        return ABSENT
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def time_decoding(step: Step, options: Options) -> Timed:
    """Gives the rival the prompt, then its own tokens, one at a time."""
    prefill_ms, token = _timed(step, options.prompt)
    tokens, times = [token], []
    read, faults = _bytes_read(), _major_faults()
    for _ in range(options.tokens):
        ms, token = _timed(step, [token])
        times.append(ms)
        tokens.append(token)
    after = _bytes_read()
    bytes_read = None if read is None or after is None else after - read
    return Timed(prefill_ms, times, bytes_read, _major_faults() - faults, tokens)


def _timed(step: Step, ids: list[int]) -> tuple[float, int]:
    start = time.perf_counter()
    token = step(ids)
    return (time.perf_counter() - start) * 1e3, token


def _bytes_read() -> int | None:
    """Bytes that this process, faults of its maps included, had read from drives until now."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:  # another system than Linux
        return None
    found = re.search(r"^read_bytes: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _read_prompt(path: Path) -> list[int]:
    """Token ids from a JSON list."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a JSON list of token ids: {error}") from None
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
        raise UserError(f"{path} is no JSON list of token ids; write for example [1, 15, 27]")
    return prompt
