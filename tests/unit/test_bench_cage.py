"""A cage limits and counts a process tree and leaves nothing; `forget` makes files cold.

What needs a cgroup of our own is skipped where none can be made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.bench.cage import Cage, cached_bytes, forget, run
from common.cgroup import memory_groups

MB = 1 << 20
TIMEOUT_S = 20.0


@pytest.fixture
def group() -> None:
    with Cage(None) as cage:
        if not cage.enforced:
            pytest.skip(cage.why_not)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def our_groups() -> list[Path]:
    name = f"inflash-bench-{os.getpid()}-*"
    parents = {g.folder for g in memory_groups()}
    return [folder for parent in parents for folder in parent.glob(name)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("group")
class TestCapped:
    def test_a_command_that_needs_more_is_killed_and_the_outcome_says_so(self) -> None:
        outcome = run(python("b = bytearray(200 << 20)"), 64 * MB, timeout_s=TIMEOUT_S)
        assert outcome.enforced
        assert outcome.oom_killed
        assert outcome.rc == -9
        assert outcome.peak_bytes is not None
        assert 60 * MB < outcome.peak_bytes <= 64 * MB
        assert not outcome.timed_out
        assert our_groups() == []

    def test_a_command_within_its_cap_ends_as_it_would(self) -> None:
        code = "import sys; b = bytearray(40 << 20); print('out'); sys.exit('err')"
        outcome = run(python(code), 200 * MB, timeout_s=TIMEOUT_S)
        assert (outcome.stdout, outcome.stderr, outcome.rc) == ("out\n", "err\n", 1)
        assert not outcome.oom_killed
        assert outcome.why_not == ""
        assert outcome.peak_bytes is not None
        assert 40 * MB < outcome.peak_bytes < 200 * MB

    def test_no_cap_still_counts(self) -> None:
        small = run(python("pass"), None, timeout_s=TIMEOUT_S)
        large = run(python("b = bytearray(100 << 20)"), None, timeout_s=TIMEOUT_S)
        assert small.peak_bytes is not None
        assert large.peak_bytes is not None
        assert 95 * MB < large.peak_bytes - small.peak_bytes < 110 * MB

    def test_the_page_cache_that_a_command_fills_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(64 * MB))
        if forget([path]):
            pytest.skip("this file system keeps its files in memory")
        outcome = run(["cat", path], None, timeout_s=TIMEOUT_S)
        assert len(outcome.stdout) == 64 * MB
        assert outcome.peak_bytes is not None
        assert outcome.peak_bytes > 64 * MB

    def test_children_that_left_the_session_end_with_the_cage(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        script = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 60' & sleep 0.3; echo started"
        outcome = run(["sh", "-c", script], None, timeout_s=TIMEOUT_S)
        assert outcome.stdout == "started\n"
        assert not is_alive(int(pid_file.read_text()))
        assert our_groups() == []

    def test_a_timeout_ends_it(self) -> None:
        outcome = run(["sh", "-c", "echo begun; sleep 60"], None, timeout_s=0.5)
        assert outcome.timed_out
        assert outcome.rc == -9
        assert outcome.stdout == "begun\n"
        assert our_groups() == []

    def test_several_commands_share_a_cage_and_an_exception_removes_it(self) -> None:
        with pytest.raises(KeyboardInterrupt), Cage(500 * MB) as cage:  # noqa: PT012
            hold = "b = bytearray(50 << 20); print('held', flush=True); import time; time.sleep(60)"
            processes = [cage.start(python(hold), stdout=subprocess.PIPE) for _ in range(2)]
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == b"held\n"
                process.stdout.close()
            assert cage.peak_bytes is not None
            assert cage.peak_bytes > 100 * MB
            raise KeyboardInterrupt
        assert [process.returncode for process in processes] == [-9, -9]
        assert (cage.peak_bytes or 0) > 100 * MB, "the last reading is kept"
        assert our_groups() == []


class TestWithoutGroups:
    """A machine whose `/` has no cgroups."""

    def test_it_runs_uncapped_and_says_so(self, tmp_path: Path) -> None:
        with Cage(64 * MB, root=tmp_path) as cage:
            process = cage.start(python("b = bytearray(100 << 20)"))
            assert process.wait(TIMEOUT_S) == 0
        assert not cage.enforced
        assert "no memory cgroup could be made" in cage.why_not
        assert cage.peak_bytes is None
        assert not cage.oom_killed

    def test_groups_without_a_memory_controller_are_left_as_they_were(self, tmp_path: Path) -> None:
        folder = fake_version_2(tmp_path)
        with Cage(64 * MB, root=tmp_path) as cage:
            assert "memory.peak" in cage.why_not
        assert list(folder.iterdir()) == []

    def test_what_runs_is_ended(self, tmp_path: Path) -> None:
        with Cage(None, root=tmp_path) as cage:
            process = cage.start(["sleep", "60"])
        assert process.returncode == -9


def fake_version_2(root: Path) -> Path:
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    (root / "proc/self/cgroup").write_text("0::/\n")
    return folder


class TestPageCache:
    def test_forget_makes_files_cold_and_reading_makes_them_warm(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        sizes = {"a": 3 * MB, "b": 5 * MB + 17, "empty": 0}
        for name, size in sizes.items():
            (folder / name).write_bytes(os.urandom(size))
        assert cached_bytes([folder]) == 8 * MB + 17, "what was written is cached"
        if forget([folder]):
            pytest.skip("this file system keeps its files in memory")
        assert cached_bytes([folder]) == 0
        (folder / "a").read_bytes()
        assert cached_bytes([folder]) == cached_bytes([folder / "a"]) == 3 * MB

    def test_pages_that_are_mapped_stay_and_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(os.urandom(MB))
        if forget([path]):
            pytest.skip("this file system keeps its files in memory")
        code = (
            "import mmap, sys; file = open(sys.argv[1]);"
            " m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096]);"
            " print('mapped', flush=True); sys.stdin.read()"
        )
        reader = subprocess.Popen(
            [*python(code), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"mapped\n"
            assert forget([path]) > 0
        deadline = time.monotonic() + TIMEOUT_S
        while forget([path]) and time.monotonic() < deadline:
            pass
        assert cached_bytes([path]) == 0
