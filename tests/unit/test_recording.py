"""Recordings: what is written is what was seen, and nothing unfinished opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.learn.recording import Recording, record, recording_bytes, windows_per_pass
from common.model.streamed import Bits, final_states, load_streamed
from common.store.geometry import Geometry
from tests.checkpoints import VOCAB
from tests.conftest import Made

WINDOWS, LENGTH = 5, 16

Ids = np.ndarray[Any, np.dtype[np.int32]]


def windows(seed: int = 3) -> Ids:
    ids = np.random.default_rng(seed).integers(3, VOCAB, (WINDOWS, LENGTH))
    return ids.astype(np.int32)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, at a moment that the test chooses."""


def stop_midway(done: int, total: int) -> None:
    if 0 < done < total:
        raise Stopped


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_recorded_is_what_was_seen(made: Made, tmp_path: Path, dtype: str) -> None:
    store, ids = made.store("opt", dtype), windows()
    seen: dict[int, tuple[torch.Tensor, Bits | None]] = {}
    final_states(load_streamed(store, lambda i, x, fired: seen.update({i: (x, fired)})), ids)
    recording = record(store, ids, tmp_path / "made" / "here", batch=WINDOWS)
    assert (recording.tokens, recording.length) == (WINDOWS * LENGTH, LENGTH)
    assert recording.x_layers == (-1, 0, 1, 2)
    assert np.array_equal(recording.ids(), ids)
    half = dtype != "float32"
    for layer, (x, fired) in seen.items():
        found = recording.x(layer)
        assert found.dtype == (np.float16 if half else np.float32)
        assert np.array_equal(found, (x.half() if half else x).numpy())
        if fired is not None:
            assert np.array_equal(recording.fired(layer), fired)
            bools = recording.unpack(recording.fired(layer)[3:7])
            assert bools.shape == (4, store.geometry.neurons)
            assert bools[2, 9] == bool(fired[5, 1] & 2)
    with pytest.raises(ValueError, match="read-only"):
        recording.x(0)[0, 0] = 1.0


@pytest.mark.parametrize("variant", ["opt-postln", "llama-gqa"])
def test_nothing_kept_records_the_same(made: Made, tmp_path: Path, variant: str) -> None:
    store, ids = made.store(variant), windows()
    kept = record(store, ids, tmp_path / "kept", batch=2)
    record(store, ids, tmp_path / "streamed", batch=2, keep_bytes=0)
    for name in kept.files():
        expected = (tmp_path / "kept" / name).read_bytes()
        assert (tmp_path / "streamed" / name).read_bytes() == expected, name


def test_several_passes_are_recorded_in_order(made: Made, tmp_path: Path) -> None:
    store, ids = made.store("llama-gqa"), windows()
    at_once = record(store, ids, tmp_path / "at-once", batch=WINDOWS)
    heard: list[tuple[int, int]] = []
    in_turn = record(
        store, ids, tmp_path / "in-turn", batch=2, progress=lambda *step: heard.append(step)
    )
    total = WINDOWS * LENGTH
    assert heard == [(0, total), (2 * LENGTH, total), (4 * LENGTH, total), (total, total)]
    for layer in at_once.x_layers:
        np.testing.assert_allclose(in_turn.x(layer), at_once.x(layer), atol=1e-4)
    for layer in at_once.layers:
        assert (in_turn.fired(layer) == at_once.fired(layer)).mean() > 0.99


@pytest.mark.parametrize(
    ("layers", "x_layers"), [([0], (-1, 0)), ([2], (1, 2)), ([2, 0], (-1, 0, 1, 2))]
)
def test_some_layers_and_each_ones_predecessor(
    made: Made, tmp_path: Path, layers: list[int], x_layers: tuple[int, ...]
) -> None:
    store, ids = made.store("opt"), windows()
    recording = record(store, ids, tmp_path, layers=layers, batch=WINDOWS)
    assert recording.layers == tuple(sorted(layers))
    assert recording.x_layers == x_layers
    whole = record(store, ids, tmp_path / "whole", batch=WINDOWS)
    for layer in x_layers:
        assert np.array_equal(recording.x(layer), whole.x(layer))
    for layer in layers:
        assert np.array_equal(recording.fired(layer), whole.fired(layer))
    with pytest.raises(ValueError, match="layer 1 are not recorded"):
        recording.fired(1)
    sizes = {p.name: p.stat().st_size for p in tmp_path.glob("*.bin")}
    assert sum(sizes.values()) == recording_bytes(store.geometry, ids.size, layers)


@pytest.mark.parametrize(
    ("hidden", "length", "windows"),
    [(64, 512, 8), (4096, 512, 8), (4096, 2048, 2), (8192, 512, 5), (8192, 4096, 1)],
)
def test_a_wide_models_passes_are_smaller(hidden: int, length: int, windows: int) -> None:
    geometry = Geometry(layers=2, neurons=4 * hidden, hidden=hidden, gated=False, dtype="float16")
    assert windows_per_pass(geometry, length) == windows


def test_layers_that_are_not_there_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers 0 to 2"):
        record(made.store("opt"), windows(), tmp_path, layers=[3])


def test_the_same_recording_is_not_made_again(made: Made, tmp_path: Path) -> None:
    store, total = made.store("opt"), WINDOWS * LENGTH
    first = record(store, windows(), tmp_path)
    heard: list[tuple[int, int]] = []
    assert record(store, windows(), tmp_path, progress=lambda *s: heard.append(s)) == first
    assert heard == [(total, total)]
    other = record(store, windows(seed=4), tmp_path)
    assert other.text_digest != first.text_digest
    assert np.array_equal(other.ids(), windows(seed=4))
    of_another = record(made.store("opt-nobias"), windows(seed=4), tmp_path)
    assert of_another.store_id != other.store_id


def test_an_interrupted_recording_does_not_open(made: Made, tmp_path: Path) -> None:
    store = made.store("opt")
    record(store, windows(seed=4), tmp_path)  # what is replaced is gone, too
    with pytest.raises(Stopped):
        record(store, windows(), tmp_path, batch=2, progress=stop_midway)
    with pytest.raises(UserError, match="no finished recording"):
        Recording.open(tmp_path)
    again = record(store, windows(), tmp_path)
    assert np.array_equal(again.ids(), windows())


def test_a_recording_that_lost_bytes_is_refused_and_made_again(made: Made, tmp_path: Path) -> None:
    store = made.store("opt")
    record(store, windows(), tmp_path)
    path = tmp_path / "fired-001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"fired-001\.bin"):
        Recording.open(tmp_path)
    assert record(store, windows(), tmp_path).fired(1).shape == (WINDOWS * LENGTH, 32)


@pytest.mark.parametrize("change", [{"version": 99}, {"tokens": "many"}, {"length": None}])
def test_a_meta_file_of_something_else_is_refused(
    made: Made, tmp_path: Path, change: dict[str, Any]
) -> None:
    record(made.store("opt"), windows(), tmp_path)
    meta = tmp_path / "recording.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(UserError, match=r"recording\.json"):
        Recording.open(tmp_path)


def test_other_files_of_the_folder_stay(made: Made, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    record(made.store("opt"), windows(), tmp_path)
    record(made.store("opt"), windows(seed=4), tmp_path)
    assert (tmp_path / "report.json").read_text() == "{}"


def test_too_little_disk_is_said_before_anything_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = made.store("opt"), windows()
    needed = recording_bytes(store.geometry, ids.size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed // 2))
    with pytest.raises(UserError, match=f"{needed:,} bytes needed, .* free.*--tokens") as refusal:
        record(store, ids, tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert not list(tmp_path.glob("*.bin"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    record(store, ids, tmp_path)
    # What a new recording replaces is room for it.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    record(store, windows(seed=4), tmp_path)


def test_two_do_not_record_in_one_folder(made: Made, tmp_path: Path) -> None:
    store = made.store("opt")
    refused = []

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is recording"):
            record(store, windows(), tmp_path)
        refused.append(done)

    recording = record(store, windows(), tmp_path, batch=WINDOWS, progress=meanwhile)
    assert len(refused) == 2
    assert np.array_equal(recording.ids(), windows())
