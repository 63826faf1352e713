"""The `inflash` command as a user runs it."""

from __future__ import annotations

import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import inflash
from common import messages
from common.launch import CHECKOUT
from inflash import _checkout
from inflash._chat import Conversation
from inflash._errors import InflashError
from inflash._progress import SHOW_AFTER_S
from tests.conftest import Made
from tests.played import PATIENCE_S, Served, serving_played

INFLASH = [sys.executable, "-m", "inflash"]


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*INFLASH, *arguments],
        env=os.environ | {"INFLASH_RUN_DIR": str(run_dir)},
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], typed: str = "") -> tuple[int, str, str]:
    """Its status, stdout and stderr."""
    out, err = process.communicate(typed, timeout=30)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(run_dir: Path, *arguments: str, typed: str = "") -> tuple[int, str, str]:
    return finish(start(run_dir, *arguments), typed)


@pytest.fixture
def served(run_dir: Path, made: Made) -> Iterator[Served]:
    with serving_played(run_dir, made.store("opt")) as served:
        served.peers.start()
        served.until("ready")
        yield served


def answer(served: Served, token_ids: Sequence[int], reason: str = "length") -> threading.Thread:
    """Plays compute for the next request."""

    def play() -> None:
        request = served.peers.expect(messages.Admit).request
        for token_id in token_ids:
            served.peers.token(request, token_id)
        served.peers.done(request, reason, "it broke" if reason == "failed" else "")

    player = threading.Thread(target=play)
    player.start()
    return player


@pytest.mark.parametrize("extra", [[], ["--no-stream"]])
def test_generate_writes_the_text_and_a_line_of_figures(served: Served, extra: list[str]) -> None:
    player = answer(served, [36, 37, 38])
    status, out, err = run(served.run_dir, "generate", "-", "-n", "3", *extra, typed="def ")
    player.join()
    assert status == 0
    assert len(out.rstrip("\n")) == 3
    assert "3 tokens · " in err
    assert "hit rate 50.0 %" in err


def test_generate_json_is_one_object(served: Served) -> None:
    player = answer(served, [36, 37])
    status, out, err = run(served.run_dir, "generate", "def ", "--json", "--temperature", "0.5")
    player.join()
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["token_ids"] == [36, 37]
    assert result["finish_reason"] == "length"
    assert result["stats"]["new_tokens"] == 2
    assert len(result["text"]) == 2


def test_errors_are_one_line(served: Served) -> None:
    status, out, err = run(served.run_dir, "generate", "")
    assert (status, out, err) == (1, "", "error: gateway: the prompt is empty\n")
    status, _, err = run(served.run_dir, "generate", "a", "--top-p", "2")
    assert status == 2
    assert "top_p=2.0: it must be above 0" in err
    player = answer(served, [36], "failed")
    status, _, err = run(served.run_dir, "generate", "a")
    player.join()
    assert (status, err) == (1, "error: reader: it broke\n")


def test_ctrl_c_cancels_and_keeps_what_came(served: Served) -> None:
    process = start(served.run_dir, "generate", "a")
    request = served.peers.expect(messages.Admit).request
    served.peers.token(request, 36)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert served.peers.expect(messages.Abort).request == request
    served.peers.done(request, "cancelled")
    status, out, _ = finish(process)
    assert status == 130
    assert len(first + out) == 2


def test_a_closed_pipe_is_no_error_and_frees_the_machine(served: Served) -> None:
    process = start(served.run_dir, "generate", "a")
    request = served.peers.expect(messages.Admit).request
    assert process.stdout is not None
    process.stdout.close()
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None:
        assert time.monotonic() < deadline
        served.peers.token(request, 36)
        time.sleep(0.05)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()
    assert served.peers.expect(messages.Abort).request == request


def test_chat_of_a_model_without_a_template_is_a_transcript(served: Served) -> None:
    process = start(served.run_dir, "chat")
    assert process.stdin is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    admit = served.peers.expect(messages.Admit)
    assert admit.sampling.stop == ("\nUser:",)
    served.peers.token(admit.request, 36)
    served.peers.done(admit.request, "stop")
    process.stdin.write("again\n")
    process.stdin.flush()
    second = served.peers.expect(messages.Admit)
    assert len(second.prompt) > len(admit.prompt)
    served.peers.done(second.request, "failed", "it broke")
    status, out, err = finish(process)
    assert status == 0
    assert out == "B\n\n"
    assert err == "error: reader: it broke\n"


def test_status(served: Served) -> None:
    status, out, _ = run(served.run_dir, "status", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["state"] == "ready"
    assert set(report["services"]) == {"gateway", "compute", "predictor", "reader"}
    assert report["services"]["gateway"]["pid"] == served.process.pid
    assert report["store"]["layers"] == 3
    assert report["plan"]["context"] == 64
    assert report["settings"]["predictor"] == "all"
    status, out, _ = run(served.run_dir, "status")
    assert status == 0
    for word in ("gateway", "compute", "ready", "context 64", "0 running"):
        assert word in out
    assert "predictor all, policy auto, window auto, slots global, extras ahead" in out


def test_status_watch_ends_with_ctrl_c(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal: it shows what it has at once
    process = start(served.run_dir, "status", "--watch")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    status, _, _ = finish(process)
    assert status == 0
    assert "ready" in first


@pytest.mark.parametrize("command", [["generate", "a"], ["chat"], ["status"]])
def test_no_server_is_one_line(run_dir: Path, command: list[str]) -> None:
    status, out, err = run(run_dir, *command)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: no server answers in {run_dir}; start one with `inflash serve")
    assert err.count("\n") == 1


def test_version_and_help(run_dir: Path) -> None:
    assert run(run_dir, "--version")[1] == f"inflash, version {inflash.__version__}\n"
    out = run(run_dir, "--help")[1]
    for name in ("generate", "chat", "status", *_checkout.COMMANDS):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("name", _checkout.COMMANDS)
def test_a_servers_command_shows_its_scripts_own_help(run_dir: Path, name: str) -> None:
    status, out, _ = run(run_dir, name, "--help")
    assert status == 0
    assert out.startswith(f"Usage: inflash {name} ")
    for parameter in importlib.import_module(f"scripts.{name}").main.params:
        assert all(option in out for option in parameter.opts if option.startswith("--"))


def test_a_folder_named_scripts_in_the_way_is_not_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "verify.py").write_text("raise SystemExit('not mine')")
    result = subprocess.run(
        [*INFLASH, "verify", "nowhere"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "not mine" not in result.stderr
    assert "nowhere" in result.stderr


def test_without_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkout, "find_checkout", lambda: None)
    with pytest.raises(InflashError, match="`inflash serve` runs from a checkout"):
        _checkout.run_script("serve", [])


def test_a_conversation_with_a_template_is_turns() -> None:
    conversation = Conversation(has_template=True, stops=["x"])
    conversation.add("user", "hi")
    conversation.add("assistant", "ho")
    assert conversation.prompt == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert conversation.stops == ("x",)
    conversation.take_back()
    assert len(conversation.turns) == 1


def test_a_terminal_sees_how_far_a_long_prompt_is(served: Served) -> None:
    def play() -> None:
        request = served.peers.expect(messages.Admit).request
        for layers_done in range(1, 8):
            told = messages.Prefilling(request, 512, 1024, 512, layers_done, 8, 75.0)
            served.peers.answers.send(told)
            time.sleep(SHOW_AFTER_S / 4)
        served.peers.token(request, 36)
        served.peers.done(request, "length", "")

    player = threading.Thread(target=play)
    player.start()
    ours, theirs = pty.openpty()
    terminal = {"COLUMNS": "100", "TERM": "xterm"}
    command = subprocess.Popen(
        [*INFLASH, "generate", "-", "-n", "1"],
        env=os.environ | {"INFLASH_RUN_DIR": str(served.run_dir)} | terminal, cwd=CHECKOUT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    out, _ = command.communicate(b"def ", timeout=PATIENCE_S)
    player.join()
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert command.returncode == 0
    assert len(out.decode().rstrip("\n")) == 1, "the text alone"
    assert "512 of 1,024 tokens, layer 7 of 8, 1 min 15 s left" in seen


def test_a_pipe_sees_nothing_of_it(served: Served) -> None:
    def play() -> None:
        request = served.peers.expect(messages.Admit).request
        time.sleep(1.1 * SHOW_AFTER_S)
        served.peers.answers.send(messages.Prefilling(request, 0, 9, 9, 1, 8, 75.0))
        served.peers.token(request, 36)
        served.peers.done(request, "length", "")

    player = threading.Thread(target=play)
    player.start()
    status, _, err = run(served.run_dir, "generate", "-", "-n", "1", typed="def ")
    player.join()
    assert status == 0
    assert "layer" not in err
