"""Every way a service ends: requests get one failure that names it, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.launch import CHECKOUT
from common.messages import SERVICES
from common.store.store import Store
from inflash import Client, RequestFailed, ServerNotFound
from tests.checkpoints import VOCAB
from tests.conftest import Made, assert_clean, serving

LONG = {"max_new_tokens": 400, "ignore_eos": True}


@contextlib.contextmanager
def serve_command(store: Store, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`inflash serve` as a user runs it, ready."""
    command = [sys.executable, "-m", "inflash", "serve", str(store.path), "--run-dir", str(run_dir)]
    process = subprocess.Popen(
        [*command, "--cache", "2%", "--predictor", "all", "--sequences", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("ready: ") for line in lines), "the plan, then one line"
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def pids(client: Client) -> dict[str, int]:
    services = client.status()["services"]
    assert {entry["state"] for entry in services.values()} == {"ready"}
    return {name: entry["pid"] for name, entry in services.items()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_lost_service_fails_requests_and_the_server(
    made: Made, run_dir: Path, service: str, number: signal.Signals
) -> None:
    store = made.store("opt")
    with serve_command(store, run_dir) as process, Client(run_dir) as client:
        pid = pids(client)[service]
        running = client.generate([5, 6, 7], **LONG)
        beside = client.generate([6, 7], **LONG)
        waiting = client.generate([8, 9], **LONG)  # there is no room for three
        next(running)
        next(beside)
        os.kill(pid, number)
        for generation in (running, beside, waiting):
            with pytest.raises(RequestFailed) as failure:
                list(generation)
            assert failure.value.service == service
        assert process.wait(timeout=20) == 1
        assert process.stderr is not None
        assert service in process.stderr.read()
    assert_clean(run_dir)
    assert not Path(f"/proc/{pid}").exists()
    if number == signal.SIGSTOP:
        return  # the next server is tried once per service: after the kill
    with serving(store, run_dir) as client:
        assert len(list(client.generate([5, 6, 7], max_new_tokens=3, ignore_eos=True))) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_cleanly(
    made: Made, run_dir: Path, number: signal.Signals
) -> None:
    with serve_command(made.store("opt"), run_dir) as process, Client(run_dir) as client:
        every = pids(client).values()
        next(client.generate([5, 6, 7], **LONG))
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    assert not [pid for pid in every if Path(f"/proc/{pid}").exists()]
    assert_clean(run_dir)


def test_serve_says_a_line_for_each_request_that_ended(made: Made, run_dir: Path) -> None:
    with serve_command(made.store("opt"), run_dir) as process, Client(run_dir) as client:
        assert process.stdout is not None
        list(client.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True))
        line = process.stdout.readline()
        assert line.startswith("request 1 (length) · prompt 3 · 4 tokens · ")
        assert "time, %: compute" in line
        answer = client.generate([5, 6, 7], **LONG)
        next(answer)
        answer.cancel()
        list(answer)
        assert process.stdout.readline().startswith("request 2 (cancelled) · prompt 3 · ")


def test_services_end_with_a_killed_serve(made: Made, run_dir: Path) -> None:
    with serve_command(made.store("opt"), run_dir) as process, Client(run_dir) as client:
        every = pids(client).values()
        files = [os.pidfd_open(pid) for pid in every]
        process.kill()
        for file in files:
            # A pidfd reads as ready when its process ends.
            assert select.select([file], [], [], 20)[0] == [file]
            os.close(file)
    with serving(made.store("opt"), run_dir):
        pass  # the claim of the killed one is nobody's: the next server takes it


def test_a_second_server_is_refused_and_the_first_lives(made: Made, run_dir: Path) -> None:
    store = made.store("opt")
    with serving(store, run_dir) as client:
        second = subprocess.run(
            [sys.executable, "-m", "inflash", "serve", str(store.path), "--run-dir", str(run_dir)],
            capture_output=True, text=True, cwd=CHECKOUT, timeout=60, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "is in use" in second.stderr
        assert "Traceback" not in second.stderr
        assert len(list(client.generate([5], max_new_tokens=2, ignore_eos=True))) == 2


def test_a_flipped_byte_is_named_and_never_answered(
    made: Made, run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(made.store("opt").path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    where = 17 * store.geometry.stride_bytes + 99
    with store.bundle_path(1).open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 4]))
    verify = subprocess.run(
        [sys.executable, "-m", "inflash", "verify", str(store.path), "--json"],
        capture_output=True, text=True, cwd=CHECKOUT, timeout=60, check=False,
    )  # fmt: skip
    assert verify.returncode == 1
    assert "layer 1 neuron 17" in json.dumps(json.loads(verify.stdout))
    with serving(store, run_dir, predictor="all") as client:
        for _ in range(2):
            with pytest.raises(RequestFailed, match="layer 1 neuron 17") as failure:
                list(client.generate([5, 6, 7], **LONG))
            assert failure.value.service == "reader"
        assert client.status()["state"] == "ready"


def test_a_drive_that_stalls_is_waited_for(made: Made, run_dir: Path) -> None:
    """As a disk that slept, or one behind a network: it reads, only late. It is not lost."""
    slow = {"slow": "reads:13%:5000ms", "cache": "100%"}  # each layer is read once
    with serving(made.store("opt"), run_dir, predictor="all", **slow) as client:
        assert len(list(client.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True))) == 4


def test_an_embedding_that_is_cut_fails_the_request_and_not_the_server(
    made: Made, run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(made.store("llama-relu").path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    path = store.resident_paths()[0]
    tensors = store.resident_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    whole = path.read_bytes()
    with serving(store, run_dir, cache="20%") as client:
        os.truncate(path, embedding.offset + embedding.nbytes // 2)
        with pytest.raises(RequestFailed, match=r"truncated.*inflash verify") as failure:
            list(client.generate([5, VOCAB - 1], **LONG))
        assert failure.value.service == "compute"
        path.write_bytes(whole)
        assert len(list(client.generate([5, VOCAB - 1], max_new_tokens=3, ignore_eos=True))) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--memory": "1MB"}, "INFLASH_MEMORY: 1,000,000 bytes are too few; the smallest budget"),
        ({"--cache": "1"}, "INFLASH_CACHE: 1 is too small; the smallest cache that works is"),
        ({"--cache": "lots"}, "INFLASH_CACHE: 'lots' is no size"),
        ({"--window": "few"}, "INFLASH_WINDOW: 'few' is no whole number"),
        ({"--run-dir": "/tmp/" + "long/" * 30}, "path is too long for a socket"),
    ],
)
def test_a_bad_option_is_told_in_a_line(made: Made, options: dict[str, str], said: str) -> None:
    extra = [word for pair in options.items() for word in pair]
    result = subprocess.run(
        [sys.executable, "-m", "inflash", "serve", str(made.store("opt").path), *extra],
        capture_output=True, text=True, cwd=CHECKOUT, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_honcho_starts_the_same_procfile(made: Made, run_dir: Path) -> None:
    venv = str(Path(sys.executable).parent)
    environ = os.environ | {
        "PATH": f"{venv}{os.pathsep}{os.environ['PATH']}",
        "INFLASH_STORE": str(made.store("opt").path),
        "INFLASH_RUN_DIR": str(run_dir),
    }
    honcho = subprocess.Popen(
        [f"{venv}/honcho", "start"],
        cwd=CHECKOUT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        answer: list[int] = []
        while not answer and honcho.poll() is None:
            with contextlib.suppress(ServerNotFound), Client(run_dir) as client:
                prompt = [5, 6, 7]
                answer = [t.id for t in client.generate(prompt, max_new_tokens=3, ignore_eos=True)]
        assert len(answer) == 3
    finally:
        honcho.terminate()
        honcho.wait(timeout=20)
