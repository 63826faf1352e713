"""What a bench runs on: made once, whole, with predictors in every store, where there is room."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.bench import made as bench_made
from common.bench.caps import Asked, needs_of, settings_of
from common.bench.made import Made, Shape, check_planted, gguf_absent, make, shape_of
from common.bench.names import GGUF, NAMES, OURS
from common.errors import UserError
from common.lowrank import PREDICTORS, predictor_problem
from common.plan import needs_of as needs_of_store
from common.store.store import Store

TINY = {
    "model_type": "opt", "vocab_size": 600, "hidden_size": 64, "word_embed_proj_dim": 64,
    "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 200,
}  # fmt: skip
FORMATS = ("", "int8", "int4")


class Noting:
    """A report that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, written_bytes: int) -> None: ...
    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


class Bench(NamedTuple):
    shape: Shape
    work: Path
    made: Made
    names: list[str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("work")
    config = work.with_name("tiny.json")
    config.write_text(json.dumps(TINY))
    shape = shape_of(config)
    names = [*OURS, *([] if gguf_absent(sys.executable) else GGUF)]
    return Bench(shape, work, make(shape, work, sys.executable, names, Noting()), names)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def test_what_is_there_is_not_made_again(bench: Bench) -> None:
    report = Noting()
    make(bench.shape, bench.work, sys.executable, bench.names, report, checkpoint=True)
    assert report.notes == []


def test_every_store_has_the_same_predictors(bench: Bench) -> None:
    plain = load_file(bench.made.store / PREDICTORS)
    for packed in FORMATS:
        store = Store.open(bench.made.packed_store(packed))
        assert store.geometry.packed == packed
        assert predictor_problem(store) == ""
        theirs = load_file(store.path / PREDICTORS)
        assert theirs.keys() == plain.keys()
        assert all(np.array_equal(theirs[name], plain[name]) for name in plain)


def test_stores_share_their_resident_files(bench: Bench) -> None:
    for packed in FORMATS[1:]:
        store = Store.open(bench.made.packed_store(packed))
        for path in store.resident_paths():
            assert path.samefile(bench.made.store / path.relative_to(store.path))
        store.check_digests()
        assert not list(store.path.rglob("*.link"))


def test_the_plant_is_measured_in_each_store_once(bench: Bench) -> None:
    for packed in FORMATS:
        said: list[str] = []
        first = check_planted(bench.made, packed, said.append)
        assert check_planted(bench.made, packed, said.append) == first
        assert len(said) == 1
        rows = {row["what"]: row["measured"] for row in first}
        assert rows["neurons that fire"] == pytest.approx(0.033, abs=0.02), packed
        assert rows["false negatives"] < 0.2, packed


def test_sizes_are_foretold(bench: Bench) -> None:
    fixed = 60_000  # headers, configuration, predictors' report
    for packed in FORMATS:
        path = bench.made.packed_store(packed)
        size = size_of(path) - size_of(path / PREDICTORS)
        assert bench.shape.store_bytes(packed) <= size < bench.shape.store_bytes(packed) + fixed
    for number_format in dict.fromkeys(GGUF[name] for name in bench.names if name in GGUF):
        # It has no positions, and an FFN that is a little narrower or wider.
        size, foretold = bench.made.gguf(number_format).stat().st_size, bench.shape.gguf_bytes
        assert size == pytest.approx(foretold(number_format), rel=0.15)


@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize("resident", ["float", "int8", "int4"])
@pytest.mark.parametrize("predictor", ["auto", "exact", "all"])
def test_a_shape_needs_what_its_store_needs(
    bench: Bench, packed: str, resident: str, predictor: str
) -> None:
    settings = settings_of(Asked("", {"resident": resident, "predictor": predictor}))
    found = needs_of(bench.shape, settings, packed)
    real = needs_of_store(settings, Store.open(bench.made.packed_store(packed)))
    assert found.geometry == real.geometry
    assert found.predictors_bytes == real.predictors_bytes
    assert found.packed_bytes == real.packed_bytes
    assert 0 <= found.resident_bytes - real.resident_bytes < 20_000, "headers"
    keys = ("num_attention_heads", "max_position_embeddings", "vocab_size", "hidden_size")
    assert [found.config[key] for key in keys] == [real.config[key] for key in keys]


def room(bench: Bench, work: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The refusal to make everything on a disk with so much room."""
    usage: Any = shutil.disk_usage(bench.work)._replace(free=free)
    monkeypatch.setattr(bench_made.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as raised:
        make(bench.shape, work, sys.executable, NAMES, Noting())
    assert not work.exists()
    return str(raised.value)


def test_room_is_checked_before_anything_is_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "not" / "yet"
    said = room(bench, work, 1_000, monkeypatch)
    for what in ("the checkpoint", "the store", "the int8 store", "the int4 store",
                 "the F16 GGUF file", "the Q8_0 GGUF file", "the Q4_0 GGUF file"):  # fmt: skip
        assert f"{what} " in said
    assert "1,000 free" in said
    assert "--only inflash needs" in said, "and even that is too much"
    shape = bench.shape
    some = shape.checkpoint_bytes + shape.store_bytes() + shape.gguf_bytes("q8_0")
    said = room(bench, work, int(1.05 * some), monkeypatch)
    # accelerate runs on the checkpoint; of those that take more, there is room for the smallest.
    assert "--only inflash,accelerate,llama_cpp_q4_0 needs" in said


def test_room_is_for_what_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage(bench.work)._replace(free=0)
    monkeypatch.setattr(bench_made.shutil, "disk_usage", lambda path: usage)
    make(bench.shape, bench.work, sys.executable, bench.names, Noting())
