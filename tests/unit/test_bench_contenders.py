"""Contenders: taking turns, failures, what is cold, and programs whose packages are absent."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from common.bench import contenders
from common.bench.contenders import Contender, Run, run, run_rounds
from common.bench.made import gguf_absent
from common.bench.names import RIVALS
from tests.unit.test_bench_figures import result_of, run_of

RESULT = result_of([1.0, 2.0])


def contender(name: str, code: str = "", *files: Path) -> Contender:
    return Contender(name, [sys.executable, "-c", code], None, files)


def test_contenders_take_turns_every_second_round_in_reverse() -> None:
    order = []

    def once(one: Contender) -> Run:
        order.append(one.name)
        return run_of(RESULT)

    runs = run_rounds([contender(n) for n in "abc"], 3, lambda said: None, once)
    assert order == [*"abc", *"cba", *"abc"]
    assert {name: len(done) for name, done in runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_one_that_failed_is_not_run_again() -> None:
    said: list[str] = []

    def once(one: Contender) -> Run:
        return run_of(None, problem="it was killed") if one.name == "b" else run_of(RESULT)

    runs = run_rounds([contender(n) for n in "ab"], 2, said.append, once)
    assert (len(runs["a"]), len(runs["b"])) == (2, 1)
    assert said == [
        "round 1 of 2: a: 1.5 ms a token, the prompt 1 ms",
        "round 1 of 2: b: it was killed",
        "round 2 of 2: a: 1.5 ms a token, the prompt 1 ms",
    ]


def test_a_run_is_cold_and_knows_no_settings_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLASH_CACHE", "1%")
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 100_000)
    code = "import json, os; print('noise'); print(json.dumps({'all': sorted(os.environ)}))"
    done = run(contender("a", code, path))
    assert done.problem == ""
    assert done.result is not None
    assert "PATH" in done.result["all"]
    assert "INFLASH_CACHE" not in done.result["all"]
    assert done.warm_bytes == 0 or not sys.platform.startswith("linux")


def test_a_failure_says_what_the_program_said_last() -> None:
    done = run(contender("a", "import sys; sys.exit('no such model')"))
    assert done.result is None
    assert done.problem == "it ended with status 1: no such model"
    killed = run(contender("a", "import os; os.kill(os.getpid(), 9)"))
    assert killed.problem == "it was ended by signal 9"
    late = run(contender("a", "import time; time.sleep(60)"), timeout_s=0.3)
    assert late.problem == "it was not done after 0 s"


def test_one_that_crashes_with_its_copies_runs_without_them() -> None:
    code = (
        "import os, sys, json\n"
        "'--copies' in sys.argv and os.kill(os.getpid(), 11)\n"
        "print(json.dumps({'note': 'one', 'argv': sys.argv[1:]}))\n"
    )
    one = contender("a", code)
    done = run(dataclasses.replace(one, command=[*one.command, "--mode", "mmap", "--copies"]))
    assert done.problem == ""
    assert done.result == {
        "note": "one; without copies of its weights: with them it was ended by signal 11",
        "argv": ["--mode", "mmap"],
    }
    both = contender("a", "import os; os.kill(os.getpid(), 11)")
    done = run(dataclasses.replace(both, command=[*both.command, "--copies"]))
    assert done.problem == "it was ended by signal 11"


def bare_python(folder: Path) -> str:
    """An interpreter without any package."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("rival", [*RIVALS, "plain"])
def test_a_rival_without_its_packages_is_absent(rival: str, tmp_path: Path) -> None:
    why = contenders.absent(rival, bare_python(tmp_path))
    assert "not installed: pip install" in why or "No module named" in why, why


def test_a_rival_that_has_its_packages_is_not_absent() -> None:
    assert contenders.absent("plain", sys.executable) == ""


def test_an_interpreter_that_is_none() -> None:
    assert "cannot be run" in contenders.absent("plain", "/nowhere/python")


def test_a_gguf_file_takes_its_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        assert gguf_absent(sys.executable) == "gguf is not installed: pip install gguf"
    else:
        assert gguf_absent(sys.executable) == ""


def test_commands_are_one_word_each(tmp_path: Path) -> None:
    work = contenders.Work(tmp_path / "ids.json", 4, 2)
    one = contenders.inflash(
        "x", tmp_path, work, {"cache": "24%"}, 5, prompts=3, warm=True, clients=(1, 8)
    )
    assert all(isinstance(word, str) for word in one.command)
    assert one.command[one.command.index("--set") + 1] == "cache=24%"
    assert {"--prompts=3", "--warm", "--clients=1", "--clients=8"} <= set(one.command)
    assert one.serves


def test_llama_cpp_copies_mapped_weights_only_where_the_cap_has_room(tmp_path: Path) -> None:
    work, path = contenders.Work(tmp_path / "ids.json", 4, 2), tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))

    def command(cap_bytes: int | None) -> list[str]:
        return contenders.llama_cpp("llama_cpp_q4_0", path, work, cap_bytes, "python").command

    assert "--copies" in command(1500)
    assert "--copies" not in command(1499)
    assert command(1499)[-1] == "mmap"
    assert command(None)[-1] == "ram", "nothing is mapped: llama.cpp copies as it likes"
