"""Conversions that are killed, stopped, or meet each other: nothing half-made opens as a store."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import StoreError
from common.model.convert import Silent, convert
from common.store.partial import JOURNAL, open_partial, partial_of
from common.store.store import Store
from common.store.verify import verify_store
from tests.checkpoints import make_checkpoint
from tests.unit.test_placement import write_predictors, write_trace

# Forks a child per call of fsync, rename and unlink, and per larger write, of a conversion; kills
# it there with SIGKILL, a write half done; checks what is left; then lets another child finish it.
# The conversion places neurons and takes predictors along: that is all it can be asked for.
DRIVER = """
import os, signal, sys
from pathlib import Path
from common.errors import StoreError
from common.model.convert import convert, plan_conversion
from common.store import partial
from common.store.store import Store

src, base, donor, trace = map(Path, sys.argv[1:])
write = partial.Sink.write
os.fsync = lambda fd: None  # a killed process loses no writes; only a power cut would
plan_conversion(src, base / "whole")  # what transformers imports late, it imports once

def killed_at(limit):
    calls = 0
    def due():
        nonlocal calls
        calls += 1
        return calls == limit
    def before(call):
        def wrapped(*args, **kwargs):
            if due():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    def half(sink, data):
        if len(data) > 500 and due():
            write(sink, memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(sink, data)
    os.fsync, os.rename, os.unlink = before(os.fsync), before(os.rename), before(os.unlink)
    partial.Sink.write = half

def child(dst, limit):
    pid = os.fork()
    if not pid:
        try:
            if limit:
                killed_at(limit)
            convert(src, dst, None, trace, donor)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def opens(path):
    try:
        Store.open(path)
    except StoreError:
        return False
    return True

def content(dst):
    files = [p for p in dst.rglob("*") if p.is_file() and p.name != partial.JOURNAL]
    return {str(p.relative_to(dst)): p.read_bytes() for p in files}

assert child(base / "whole", 0) == 0
whole = content(base / "whole")
assert {"layers/001.order", "predictors.safetensors", "predictors.json"} <= whole.keys()
limit = published = 0
while True:
    limit += 1
    dst = base / f"killed-{limit}"
    status = child(dst, limit)
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    assert not opens(partial.partial_of(dst))
    if dst.exists():
        assert opens(dst)
        published += 1
    else:
        assert child(dst, 0) == 0
    assert content(dst) == whole, limit
    assert not partial.partial_of(dst).exists()
# And one that is killed over and over, at its 30th call, gets on each time until it is through.
dst, rounds = base / "again", 0
while not dst.exists():
    assert child(dst, 30) in (0, -signal.SIGKILL)
    assert dst.exists() or not opens(partial.partial_of(dst))
    rounds += 1
    assert rounds < 60
assert content(dst) == whole
print(limit - 1, published, rounds)
"""


@pytest.mark.timeout(300)
def test_killed_at_any_call_it_leaves_nothing_that_opens_and_resumes(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "opt-float16" / "checkpoint"
    donor, trace = tmp_path / "donor", tmp_path / "trace.npz"
    convert(golden, donor)
    write_predictors(Store.open(donor))
    write_trace(Store.open(donor), trace)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(golden), str(tmp_path), str(donor), str(trace)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points, published, rounds = map(int, done.stdout.split())
    assert points > 50
    assert published <= 3  # only between the folder's rename and the journal's end
    assert rounds >= 3


def run_command(src: Path, dst: Path, file_bytes_max: int) -> subprocess.CompletedProcess[str]:
    """The command, unable to write a file larger than that: a drive that fills up."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))

    return subprocess.run(
        [sys.executable, "-m", "scripts.convert", str(src), str(dst)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit,
        check=False,
    )


def test_drive_that_fills_up_is_a_sentence_and_resumes(tmp_path: Path) -> None:
    src, dst = make_checkpoint(tmp_path / "src", "opt"), tmp_path / "store"
    stopped = run_command(src, dst, 100_000)
    assert stopped.returncode == 1
    assert "run the same command again to resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not dst.exists()
    convert(src, dst)
    assert verify_store(dst).problems == ()


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.progress: list[int] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.progress = [total_bytes, done_bytes]

    def advance(self, written_bytes: int) -> None:
        self.progress[1] += written_bytes


def test_progress_counts_every_byte_and_starts_at_what_was_done(tmp_path: Path) -> None:
    src, dst = make_checkpoint(tmp_path / "src", "llama-relu"), tmp_path / "store"

    class Stops(Notes):
        def advance(self, written_bytes: int) -> None:
            super().advance(written_bytes)
            if self.progress[1] > self.progress[0] // 2:
                raise KeyboardInterrupt

    stopped, resumed = Stops(), Notes()
    with pytest.raises(KeyboardInterrupt):
        convert(src, dst, stopped)
    journal = (partial_of(dst) / JOURNAL).read_text().splitlines()
    files = [file for line in journal[1:] for file in json.loads(line)["files"]]
    done = sum(size for _, size, _ in files)
    before = {p: p.stat().st_mtime_ns for p in partial_of(dst).rglob("*.bundles")}
    result = convert(src, dst, resumed)
    assert resumed.notes == [f"resuming: {done:,} bytes are there already"]
    assert resumed.progress[0] == resumed.progress[1] == stopped.progress[0]
    assert result.bytes_resumed == done > 0
    for path, written in before.items():
        assert (dst / path.relative_to(partial_of(dst))).stat().st_mtime_ns == written


def test_another_source_starts_over_and_says_so(tmp_path: Path) -> None:
    dst = tmp_path / "store"
    with open_partial(dst, "of another checkpoint") as partial:
        entries: list[object] = []
        with partial.file("layers/000.bundles", entries) as sink:  # type: ignore[arg-type]
            sink.write(b"stale")
        partial.finish("bundles of layer 0", entries)  # type: ignore[arg-type]
    notes = Notes()
    convert(make_checkpoint(tmp_path / "src", "opt"), dst, notes)
    assert "starting over" in notes.notes[0]
    assert verify_store(dst).problems == ()
    assert verify_store(dst).surplus == ()


def test_stray_files_in_the_partial_folder_do_not_survive(tmp_path: Path) -> None:
    dst = tmp_path / "store"
    (partial_of(dst) / "layers" / "deep").mkdir(parents=True)
    (partial_of(dst) / "layers" / "deep" / "x").write_text("x")
    (partial_of(dst) / JOURNAL).write_text("not a journal")
    convert(make_checkpoint(tmp_path / "src", "opt"), dst)
    assert verify_store(dst).surplus == ()


def test_two_conversions_into_one_place(tmp_path: Path) -> None:
    src, dst = make_checkpoint(tmp_path / "src", "opt"), tmp_path / "store"
    with (
        open_partial(dst, "first"),
        pytest.raises(StoreError, match="another `inflash convert` is writing"),
    ):
        convert(src, dst)
    convert(src, dst)  # the lock is gone with its holder
    assert Store.open(dst).family == "opt"
