"""The contenders: programs that decode the same number of tokens, each in a cage of its own.

A contender is a command that prints one line of JSON (rivals/program.py). `run` drops what it will
read from the page cache, proves that it is gone, runs it, and says what the cage counted. Nothing
that it started, and nothing that a killed server left in shared memory, outlives the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.bench import cage
from common.bench.names import GGUF
from common.bench.rivals.program import ABSENT, command, read_result
from common.launch import CHECKOUT
from common.segment import segment_path

TIMEOUT_S = 2 * 3600.0  # of one run
COPIES = "--copies"
COPY_ROOM = 1.5  # of a GGUF file: weights, and what llama.cpp takes beside them

_PROGRAMS = {
    "accelerate": ("accelerate", ["--offload", "none", "--cap", "1"]),
    **{name: ("llama_cpp", ["--mode", "mmap"]) for name in GGUF},
    "plain": ("plain", []),
}
"""Each rival's module, and the arguments of its own that it cannot be asked anything without."""


@dataclass(frozen=True)
class Contender:
    """A program to run, and how."""

    name: str
    command: list[str]
    cap_bytes: int | None  # of its memory; None: it is counted, not limited
    files: tuple[Path, ...]  # files and folders that it reads: cold when it starts
    serves: bool = False  # it starts a server, and takes `--set run_dir=...`


@dataclass(frozen=True)
class Run:
    """How one run of a contender went."""

    result: dict[str, Any] | None  # None: there is none, and `problem` says why
    problem: str  # a sentence; "" if there is none
    peak_bytes: int | None  # None: not counted
    swap_bytes: int | None
    why_not_enforced: str  # "" if the cap held
    warm_bytes: int  # of its files that were still in the page cache when it started


@dataclass(frozen=True)
class Work:
    """What a contender is asked: the same for all."""

    prompt_file: Path  # JSON list of token ids
    tokens: int
    threads: int

    def arguments(self) -> list[str]:
        return [
            "--tokens", f"{self.tokens}",
            "--prompt-ids-file", str(self.prompt_file.absolute()),
            "--threads", f"{self.threads}",
        ]  # fmt: skip


def inflash(
    name: str,
    store: Path,
    work: Work,
    settings: Mapping[str, str],
    cap_bytes: int | None,
    *,
    prompts: int = 1,
    warm: bool = False,
    clients: Sequence[int] = (),
) -> Contender:
    """inflash with `settings`; asked `prompts` prompts, the first once more if `warm`, then by so
    many `clients` at once."""
    own = [f"--prompts={prompts}", *(["--warm"] if warm else [])]
    own += [f"--clients={count}" for count in clients]
    own += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "common.bench.inflash", str(store.absolute())]
    return Contender(name, [*program, *work.arguments(), *own], cap_bytes, (store,), serves=True)


def whole(name: str, store: Path, work: Work, cap_bytes: int | None) -> Contender:
    """The whole model read for every token."""
    program = [sys.executable, "-m", "common.bench.whole", str(store.absolute())]
    return Contender(name, [*program, *work.arguments()], cap_bytes, (store,))


def accelerate(
    checkpoint: Path, offload: Path, work: Work, cap_bytes: int, python: str
) -> Contender:
    """transformers with accelerate's disk offload, which is told the cap, too."""
    own = ["--offload", str(offload.absolute()), "--cap", f"{cap_bytes}"]
    program = command("accelerate", checkpoint.absolute(), python=python)
    program += [*work.arguments(), *own]
    return Contender("accelerate", program, cap_bytes, (checkpoint,))


def llama_cpp(name: str, gguf: Path, work: Work, cap_bytes: int | None, python: str) -> Contender:
    """llama.cpp: all of the file in memory without a cap, else mapped, and copied in memory to the
    order that its kernels like only where the cap has room for that."""
    program = command("llama_cpp", gguf.absolute(), python=python)
    program += [*work.arguments(), "--mode", "ram" if cap_bytes is None else "mmap"]
    if cap_bytes is not None and COPY_ROOM * gguf.stat().st_size <= cap_bytes:
        program.append(COPIES)
    return Contender(name, program, cap_bytes, (gguf,))


def plain(checkpoint: Path, work: Work, python: str) -> Contender:
    """transformers, the whole checkpoint in memory."""
    program = command("plain", checkpoint.absolute(), python=python)
    return Contender("plain", [*program, *work.arguments()], None, (checkpoint,))


def absent(rival: str, python: str) -> str:
    """Why the interpreter `python` cannot run a rival; "" if it can."""
    module, own = _PROGRAMS[rival]
    nowhere = ["none", "--tokens", "1", "--prompt-ids-file", "none"]
    # It looks for its packages before it looks for a model.
    return why_absent(command(module, *nowhere, *own, python=python))


def why_absent(program: Sequence[str | Path]) -> str:
    """Why a program in the checkout cannot run at all, by its own word; "" if it can."""
    try:
        done = subprocess.run(program, cwd=CHECKOUT, capture_output=True, text=True)
    except OSError as error:
        return f"{program[0]} cannot be run: {error.strerror}"
    if done.returncode == ABSENT:
        return str((read_result(done.stdout) or {}).get("absent", "it gives no reason"))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    missing = last.startswith("ModuleNotFoundError: ")
    return f"{program[0]}: {last.partition(': ')[2]}" if missing else ""


def run(contender: Contender, timeout_s: float = TIMEOUT_S) -> Run:
    """Runs a contender once, from a cold page cache; without its copies if it crashes with them, as
    llama.cpp does on some processors."""
    done, signal = _run(contender, timeout_s)
    if signal and COPIES in contender.command:
        words = [word for word in contender.command if word != COPIES]
        again, _ = _run(replace(contender, command=words), timeout_s)
        if again.result is not None:
            note = (
                f"{again.result['note']}; without copies of its weights: with them {done.problem}"
            )
            return replace(again, result=again.result | {"note": note})
    return done


def _run(contender: Contender, timeout_s: float) -> tuple[Run, int]:
    """How it went; and the signal that ended it of its own doing, or 0."""
    warm_bytes = cage.forget(contender.files)
    with tempfile.TemporaryDirectory(prefix="inflash-") as folder:
        own = ["--set", f"run_dir={folder}"] if contender.serves else []
        try:
            outcome = cage.run(
                [*contender.command, *own],
                contender.cap_bytes,
                timeout_s=timeout_s,
                env=_environ(),
                cwd=CHECKOUT,
            )
        finally:
            segment_path(Path(folder)).unlink(missing_ok=True)  # a killed server's
    result = read_result(outcome.stdout) if outcome.rc == 0 else None
    done = Run(
        result=result,
        problem="" if result else _problem(outcome, contender.cap_bytes, timeout_s),
        peak_bytes=outcome.peak_bytes,
        swap_bytes=outcome.swap_bytes,
        why_not_enforced=outcome.why_not,
        warm_bytes=warm_bytes,
    )
    killed = outcome.timed_out or outcome.oom_killed
    return done, 0 if killed else max(-outcome.rc, 0)


def run_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    tell: Callable[[str], None],
    once: Callable[[Contender], Run] = run,
) -> dict[str, list[Run]]:
    """Runs all contenders `rounds` times, by turns, every second round in reverse: a machine that
    gets slower does so for all. One that failed is not run again. By contender's name."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            before = runs[contender.name]
            if before and before[-1].problem:
                continue
            done = once(contender)
            before.append(done)
            tell(f"round {number + 1} of {rounds}: {contender.name}: {_said(done)}")
    return runs


def _said(done: Run) -> str:
    if done.result is None:
        return done.problem
    times = done.result["ms_per_token"]
    return (
        f"{sum(times) / len(times):,.1f} ms a token, the prompt {done.result['prefill_ms']:,.0f} ms"
    )


def _problem(outcome: cage.Outcome, cap_bytes: int | None, timeout_s: float) -> str:
    if outcome.timed_out:
        return f"it was not done after {timeout_s:,.0f} s"
    if outcome.oom_killed:
        return f"the kernel killed it: it wanted more than the cap of {cap_bytes or 0:,} bytes"
    if outcome.rc < 0:
        return f"it was ended by signal {-outcome.rc}"
    # A service says why it ends, and the one that started it that it did.
    last = outcome.stderr.strip().splitlines()[-2:] or ["it gave no reason"]
    return f"it ended with status {outcome.rc}: {'; '.join(last)}"


def _environ() -> dict[str, str]:
    """Ours without inflash's settings: those of a shell are not the bench's."""
    return {key: value for key, value in os.environ.items() if not key.startswith("INFLASH_")}
