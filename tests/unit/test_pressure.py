"""The cache shrinks when memory runs short and grows back: by figures, and by files as the kernel
writes them; and pages of slots that are out of use go back to the system."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import pagecache
from common.cgroup import machine_bytes, memory_groups
from common.errors import UserError
from common.pagecache import forget_imports
from common.segment import LARGE, SHM, attach_segment, create_segment, give_back, take_again
from common.store.store import forget_pages
from services.reader.pressure import (
    GROW_AFTER_S,
    GROW_EVERY_S,
    STEPS,
    Decider,
    Pressure,
    Source,
    read_sources,
)

MB = 1 << 20
PLANNED, LEAST = 512 * MB, 4 * MB
STRIDE = 16384


def source(headroom: int, limit: int = 4096 * MB, some: float = 0.0, full: float = 0.0) -> Source:
    return Source("a group", limit, headroom, some, full)


class TestDecider:
    def test_the_plans_reserve_is_left_alone(self) -> None:
        decider = Decider(PLANNED, LEAST)
        assert decider.decide([source(64 * MB)], PLANNED, 0.0) == PLANNED

    def test_it_shrinks_at_once_to_a_whole_reserve(self) -> None:
        decider = Decider(PLANNED, LEAST)
        assert decider.decide([source(20 * MB)], PLANNED, 0.0) == PLANNED - 44 * MB
        assert decider.decide([source(-100 * MB)], PLANNED, 0.2) == PLANNED - 164 * MB

    def test_the_tightest_source_decides(self) -> None:
        decider = Decider(PLANNED, LEAST)
        sources = [source(1000 * MB), source(10 * MB), source(20 * MB)]
        assert decider.decide(sources, PLANNED, 0.0) == PLANNED - 54 * MB

    def test_it_keeps_what_a_layer_needs_to_stream(self) -> None:
        assert Decider(PLANNED, LEAST).decide([source(-9999 * MB)], PLANNED, 0.0) == LEAST

    @pytest.mark.parametrize(("some", "full"), [(10.0, 0.0), (0.0, 5.0)])
    def test_stalls_take_a_step_a_second(self, some: float, full: float) -> None:
        decider, cache = Decider(PLANNED, LEAST), PLANNED
        for look in range(11):  # 2 s
            cache = decider.decide([source(128 * MB, some=some, full=full)], cache, look * 0.2)
        assert cache == PLANNED - 3 * PLANNED // STEPS

    def test_stalls_with_room_to_spare_are_somebody_elses(self) -> None:
        decider = Decider(PLANNED, LEAST)
        assert decider.decide([source(2048 * MB, some=90.0)], PLANNED, 0.0) == PLANNED

    def test_it_grows_back_in_steps_after_a_calm_time(self) -> None:
        decider, cache, now = Decider(PLANNED, LEAST), LEAST, 0.0
        while now < GROW_AFTER_S:
            assert decider.decide([source(1000 * MB)], cache, now) == LEAST
            now += 0.2
        grown = [decider.decide([source(1000 * MB)], cache, now)]
        assert grown[0] == LEAST + PLANNED // STEPS
        while grown[-1] < PLANNED:
            assert now < 60.0
            now += GROW_EVERY_S
            grown.append(decider.decide([source(1000 * MB)], grown[-1], now))
        assert grown[-1] == PLANNED
        assert max(np.diff(grown)) <= PLANNED // STEPS

    def test_a_short_moment_begins_the_wait_anew(self) -> None:
        decider = Decider(PLANNED, LEAST)
        cache = PLANNED // 2
        decider.decide([source(1000 * MB)], cache, 0.0)
        decider.decide([source(65 * MB)], cache, 2.0)  # enough to stay, not to grow
        assert decider.decide([source(1000 * MB)], cache, 4.0) == cache
        assert decider.decide([source(1000 * MB)], cache, 4.0 + GROW_AFTER_S) > cache

    def test_without_sources_it_grows_to_the_plan(self) -> None:
        decider = Decider(PLANNED, LEAST)
        decider.decide([], PLANNED - MB, 0.0)
        assert decider.decide([], PLANNED - MB, GROW_AFTER_S) == PLANNED

    @given(
        st.lists(
            st.tuples(st.integers(-2048, 4096), st.floats(0, 100), st.floats(0, 100)), max_size=40
        )
    )
    def test_it_stays_within_its_bounds_and_rests(
        self, looks: list[tuple[int, float, float]]
    ) -> None:
        decider, cache, now = Decider(PLANNED, LEAST), PLANNED, 0.0
        for headroom, some, full in looks:
            cache = decider.decide([source(headroom * MB, some=some, full=full)], cache, now)
            assert LEAST <= cache <= PLANNED
            now += 0.5
        # A group that only we are in: what the cache gives up is headroom. It finds its size.
        taken = cache
        for _ in range(200):
            before = cache
            cache = decider.decide([source(100 * MB + taken - cache)], cache, now)
            now += 0.5
        assert cache == before


@dataclass
class Kernel:
    """A folder with the files of a kernel: / as the reader sees it."""

    root: Path
    mounts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def mount(self, where: str, shows: str, kind: str, options: str = "rw") -> None:
        line = f"30 23 0:28 {shows} {where} rw,relatime shared:9 - {kind} none {options}"
        self.mounts.append(line)
        self.write("proc/self/mountinfo", "\n".join(self.mounts))

    def join(self, line: str) -> None:
        self.groups.append(line)
        self.write("proc/self/cgroup", "\n".join(self.groups))

    def write(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def version_2(self, folder: str, used: int, **files: object) -> None:
        values: dict[str, object] = {"current": used, "high": "max", "max": "max"}
        for name, value in (values | files).items():
            self.write(f"{folder}/memory.{name}", value)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path)
    kernel.write("proc/meminfo", f"MemTotal: {8192 * 1024} kB\nMemAvailable: {6144 * 1024} kB")
    return kernel


class TestFiles:
    def test_a_version_2_group_and_its_parents(self, kernel: Kernel) -> None:
        kernel.mount("/sys/fs/cgroup", "/", "cgroup2")
        kernel.join("0::/user/inflash")
        kernel.version_2("sys/fs/cgroup/user/inflash", 900 * MB, high=1000 * MB, max=1100 * MB)
        kernel.write(
            "sys/fs/cgroup/user/inflash/memory.stat",
            f"anon 1\ninactive_file {70 * MB}\nactive_file {60 * MB}\n"
            f"file_mapped {140 * MB}\nshmem {110 * MB}",
        )
        kernel.write(
            "sys/fs/cgroup/user/inflash/memory.pressure",
            "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.25 avg60=0 total=1",
        )
        kernel.version_2("sys/fs/cgroup/user", 900 * MB, max=2000 * MB)
        own, parent, machine = read_sources(memory_groups(kernel.root), kernel.root)
        # 130 MB of files, of which 30 are mapped code: 100 can be reclaimed.
        assert (own.limit_bytes, own.headroom_bytes) == (1000 * MB, 200 * MB)
        assert (own.some, own.full) == (12.5, 3.25)
        assert (parent.limit_bytes, parent.headroom_bytes) == (2000 * MB, 1100 * MB)
        assert (machine.limit_bytes, machine.headroom_bytes) == (8192 * MB, 6144 * MB)
        assert machine_bytes(kernel.root) == 1000 * MB

    def test_a_version_1_group(self, kernel: Kernel) -> None:
        kernel.mount("/sys/fs/cgroup/cpu", "/", "cgroup", "rw,cpu")
        kernel.mount("/sys/fs/cgroup/memory", "/", "cgroup", "rw,memory")
        kernel.join("5:cpu:/elsewhere")
        kernel.join("4:memory:/inflash")
        folder = "sys/fs/cgroup/memory/inflash/memory"
        kernel.write(f"{folder}.limit_in_bytes", 9223372036854771712)
        kernel.write(f"{folder}.soft_limit_in_bytes", 500 * MB)
        kernel.write(f"{folder}.usage_in_bytes", 450 * MB)
        kernel.write(f"{folder}.stat", f"inactive_file 7\ntotal_inactive_file {25 * MB}")
        own, _ = read_sources(memory_groups(kernel.root), kernel.root)
        assert (own.limit_bytes, own.headroom_bytes) == (500 * MB, 75 * MB)

    def test_a_container_that_does_not_show_its_own_path(self, kernel: Kernel) -> None:
        kernel.mount("/sys/fs/cgroup", "/docker/abc", "cgroup2")
        kernel.join("0::/docker/abc")
        kernel.version_2("sys/fs/cgroup", 100 * MB, max=300 * MB)
        own, _ = read_sources(memory_groups(kernel.root), kernel.root)
        assert own.headroom_bytes == 200 * MB

    @pytest.mark.parametrize("path", ["/host/only", "/../sibling"])
    def test_a_path_that_is_not_there_leaves_the_mount(self, kernel: Kernel, path: str) -> None:
        kernel.mount("/sys/fs/cgroup", "/", "cgroup2")
        kernel.join(f"0::{path}")
        kernel.version_2("sys/fs/cgroup", 100 * MB, max=300 * MB)
        assert [group.folder for group in memory_groups(kernel.root)] == [
            kernel.root / "sys/fs/cgroup"
        ]

    def test_no_limits_leave_the_machine(self, kernel: Kernel) -> None:
        kernel.mount("/sys/fs/cgroup", "/", "cgroup2")
        kernel.join("0::/")
        kernel.version_2("sys/fs/cgroup", 100 * MB)
        (machine,) = read_sources(memory_groups(kernel.root), kernel.root)
        assert machine.name == "the machine"

    def test_nothing_at_all_is_no_pressure(self, tmp_path: Path) -> None:
        assert memory_groups(tmp_path) == []
        assert read_sources([], tmp_path) == []
        assert Pressure(PLANNED, LEAST, tmp_path).look(0.0, PLANNED) is None

    def test_this_machine_can_be_read(self) -> None:
        for found in read_sources(memory_groups()):
            assert found.limit_bytes > 0
            assert 0 <= found.full <= 100

    def test_a_limit_that_falls_and_rises_again(self, kernel: Kernel) -> None:
        kernel.mount("/sys/fs/cgroup", "/", "cgroup2")
        kernel.join("0::/inflash")
        folder = "sys/fs/cgroup/inflash"
        cache, rest = PLANNED, 400 * MB
        kernel.version_2(folder, rest + cache, max=1000 * MB)
        pressure = Pressure(PLANNED, LEAST, kernel.root)
        assert pressure.look(0.0, cache) is None
        kernel.write(f"{folder}/memory.high", 800 * MB)
        assert not pressure.due(0.1)
        assert pressure.due(0.3)
        target = pressure.look(0.3, cache)
        assert target == 800 * MB - 32 * MB - rest
        cache, now = target, 0.3
        kernel.write(f"{folder}/memory.high", "max")
        while cache < PLANNED and now < 60:
            now += 0.2
            kernel.write(f"{folder}/memory.current", rest + cache)
            cache = pressure.look(now, cache) or cache
        assert cache == PLANNED
        assert now > GROW_AFTER_S


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="says whether a page is cached: Linux")
def test_what_was_imported_leaves_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inflash_imported_once.py"
    path.write_text(f"TEXT = {'x' * 40_000!r}\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not on disk yet stays
        forget_pages(file.fileno())
        if _is_cached(file.fileno()):
            pytest.skip(f"{tmp_path} is in memory")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.import_module(path.stem)
        monkeypatch.setattr(pagecache, "is_limited", lambda: False)
        forget_imports()
        assert _is_cached(file.fileno()), "where memory is not limited it is of use"
        monkeypatch.setattr(pagecache, "is_limited", lambda: True)
        forget_imports()
        assert not _is_cached(file.fileno())
    del sys.modules[path.stem]


def _is_cached(fd: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


@pytest.mark.skipif(not SHM.is_dir(), reason="pages of a mapping are given back on Linux alone")
class TestPages:
    @pytest.mark.parametrize("slots", [64, 3 * LARGE // STRIDE + 5])
    def test_slots_give_their_pages_back_and_take_them_again(self, slots: int) -> None:
        path = SHM / f"inflash-test-{os.getpid()}"
        with create_segment(path, slots * STRIDE) as region:
            memory = np.frombuffer(region, np.uint8).reshape(-1, STRIDE)
            assert memory.ctypes.data % LARGE == 0, "large pages have no place"
            memory[:] = np.arange(slots)[:, None] % 250 + 1
            before = memory.copy()
            full = path.stat().st_blocks
            gone = np.array([7, 3, 4, 5, 40], np.int32)
            kept = np.setdiff1d(np.arange(slots), gone)
            assert give_back(region, gone, STRIDE)
            assert path.stat().st_blocks == full - len(gone) * STRIDE // 512
            assert (memory[kept] == before[kept]).all()
            assert take_again(path, gone, STRIDE)
            assert path.stat().st_blocks == full
            assert not memory[gone].any(), "new pages are empty"
            assert (memory[kept] == before[kept]).all()
            memory[gone] = 9
            assert (memory[gone] == 9).all()
            other = np.frombuffer(attach_segment(path, slots * STRIDE), np.uint8)
            assert (other.reshape(-1, STRIDE) == memory).all()
            del memory, other
            with pytest.raises(ValueError, match="less than"):
                attach_segment(path, (slots + 1) * STRIDE)
        assert not path.exists()

    def test_no_slots_are_no_pages(self) -> None:
        path = SHM / f"inflash-test-{os.getpid()}"
        none = np.empty(0, np.int32)
        with create_segment(path, STRIDE) as region:
            full = path.stat().st_blocks
            assert give_back(region, none, STRIDE)
            assert take_again(path, none, STRIDE)
            assert path.stat().st_blocks == full

    def test_memory_that_is_not_there_is_told(self) -> None:
        stat = os.statvfs(SHM)
        if not stat.f_blocks:
            pytest.skip(f"{SHM} has no limit")
        path = SHM / f"inflash-test-{os.getpid()}"
        with create_segment(path, STRIDE):
            beyond = stat.f_blocks * stat.f_frsize // STRIDE + 1
            assert not take_again(path, np.arange(beyond, dtype=np.int32), STRIDE)

    def test_a_segment_that_does_not_fit_is_an_error(self) -> None:
        path = SHM / f"inflash-test-{os.getpid()}"
        with pytest.raises(UserError, match="does not fit"), create_segment(path, 1 << 60):
            pass
        assert not path.exists()
