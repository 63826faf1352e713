"""Stores and servers for tests: real checkpoints, real conversions, real processes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.launch import Server
from common.model.convert import convert
from common.segment import segment_path
from common.store.store import Store
from inflash import Client
from tests.checkpoints import make_checkpoint


@dataclass
class Made:
    """Checkpoints and their stores, each made once in a test run."""

    root: Path
    stores: dict[tuple[str, str, str], Store] = field(default_factory=dict)

    def checkpoint(self, variant: str, dtype: str) -> Path:
        folder = self.root / f"{variant}-{dtype}"
        if not folder.exists():
            make_checkpoint(folder, variant, dtype)
        return folder

    def store(self, variant: str, dtype: str = "float32", bundles: str = "float") -> Store:
        key = variant, dtype, bundles
        if key not in self.stores:
            src = self.checkpoint(variant, dtype)
            dst = self.root / f"{src.name}-{bundles}-store"
            convert(src, dst, bundles=bundles)
            self.stores[key] = Store.open(dst)
        return self.stores[key]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def store_of(made: Made) -> Callable[[str, str], Store]:
    return made.store


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: a socket's has 107 bytes. Checks that nothing but logs is left in it."""
    with tempfile.TemporaryDirectory(prefix="inflash-test-") as folder:
        path = Path(folder)
        yield path
        assert_clean(path)


def assert_clean(run_dir: Path) -> None:
    left = {p.name for p in run_dir.iterdir()} - {"log"}
    assert not left, f"left in the run directory: {left}"
    assert not segment_path(run_dir).exists()


@contextlib.contextmanager
def serving(store: Store, run_dir: Path, **options: str) -> Iterator[Client]:
    """A ready server for `store` and a client of it; nothing is left afterwards."""
    given = {"store": str(store.path), "run_dir": str(run_dir), "context": "512"} | options
    with Server(given), Client(run_dir) as client:
        yield client
    assert_clean(run_dir)
