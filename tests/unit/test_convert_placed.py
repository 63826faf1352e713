"""Stores whose neurons are placed by a trace: the same model, in another order."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import common.model.bundling as bundling
from common.errors import StoreError, UserError
from common.lowrank import (
    AHEAD_PARTS,
    PICTURE,
    PREDICTORS,
    REPORT,
    Kind,
    read_predictors,
)
from common.model.bundling import reordered
from common.model.convert import convert, plan_conversion
from common.model.placement import missed, order_of_layer
from common.replay import save_trace, trace_from_bits
from common.store.checksum import bundle_checksum
from common.store.manifest import BIASES, MANIFEST, order_file
from common.store.partial import Partial, partial_of
from common.store.store import Store
from common.store.tensors import Tensor
from common.store.verify import verify_store
from scripts.convert import main
from scripts.policies import main as policies
from scripts.verify import main as verify
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.unit.test_convert_killed import Notes
from tests.unit.test_placement import KINDS, made_up_trace, write_predictors, write_trace


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", "opt", "float16")


@pytest.fixture
def plain(src: Path) -> Store:
    convert(src, src.parent / "plain")
    return Store.open(src.parent / "plain")


def assert_placed(placed: Store, plain: Store) -> None:
    """`placed` has the neurons of `plain`, in its orders, and all else as it is there."""
    geometry = plain.geometry
    for layer in range(geometry.layers):
        order = placed.order(layer)
        assert order is not None
        assert order.dtype == np.int32
        for store_of, wanted in ((placed, slice(None)), (plain, order)):
            bundles = np.fromfile(store_of.bundle_path(layer), np.uint8)
            bundles = bundles.reshape(geometry.neurons, geometry.stride_bytes)[wanted]
            assert [bundle_checksum(b) for b in bundles] == placed.checksums(layer).tolist()
        theirs, ours = plain.biases(layer), placed.biases(layer)
        assert theirs.keys() == ours.keys()
        for part, bias in theirs.items():
            assert np.array_equal(ours[part], bias if part == "down" else bias[order])
    for one, other in zip(plain.resident_paths(), placed.resident_paths(), strict=True):
        assert one.read_bytes() == other.read_bytes()


# Files of shards, of pickled weights; plain and gated; with biases and without; each dtype.
CASES = [
    ("opt", "float16", {}),
    ("opt-nobias", "bfloat16", {"sharded": True}),
    ("llama-relu", "float32", {"pickled": True}),
    ("llama-mlp-bias", "float16", {}),
]


@pytest.mark.parametrize("block_bytes", [64 << 20, 50_000])
@pytest.mark.parametrize(("variant", "dtype", "kind"), CASES)
def test_placed_stores_hold_the_same_neurons(
    variant: str, dtype: str, kind: dict[str, bool], block_bytes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert variant in VARIANTS
    src = make_checkpoint(tmp_path / "src", variant, dtype, **kind)
    convert(src, tmp_path / "plain")
    plain = Store.open(tmp_path / "plain")
    assert plain.order(0) is None
    trace = write_trace(plain, tmp_path / "trace.npz")
    monkeypatch.setattr(bundling, "BLOCK_BYTES", block_bytes)
    convert(src, tmp_path / "placed", placement=trace)
    placed = Store.open(tmp_path / "placed")
    assert_placed(placed, plain)
    for layer in range(plain.geometry.layers):
        expected = order_of_layer(made_up_trace(plain), layer)
        assert placed.order(layer).tolist() == expected.tolist()  # type: ignore[union-attr]
    found = verify_store(placed.path)
    assert (found.problems, found.surplus) == ((), ())


def test_a_trace_of_another_model_is_refused_before_anything_is_written(
    src: Path, plain: Store, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    save_trace(trace_from_bits([np.ones((4, 9), np.bool_)], 9, 4096), other)
    (tmp_path / "none.npz").write_bytes(b"none")
    for path, reason in [(other, "1 layers of 9 neurons, the checkpoint has 3 of 256"),
                         (tmp_path / "none.npz", "cannot be read as a trace"),
                         (tmp_path / "gone.npz", "No such file")]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            convert(src, tmp_path / "placed", placement=path)
        said = CliRunner().invoke(main, [str(src), str(tmp_path / "x"), "--placement", str(path)])
        assert said.exit_code == 1
        assert "error: " in said.stderr
    assert not list(tmp_path.glob("placed*"))
    assert not list(tmp_path.glob("x*"))


def test_the_plan_names_trace_and_predictors(src: Path, plain: Store, tmp_path: Path) -> None:
    write_predictors(plain)
    trace = write_trace(plain, tmp_path / "trace.npz")
    options = ["--placement", str(trace), "--predictors", str(plain.path), "--dry-run"]
    table = CliRunner().invoke(main, [str(src), str(tmp_path / "x"), *options])
    assert table.exit_code == 0, table.output
    assert "60 tokens" in table.stdout
    assert "those of" in table.stdout
    bare, full = (plan_conversion(src, tmp_path / "x", *more) for more in ((), (trace, plain.path)))
    assert (bare.placement, bare.predictors) == (None, None)
    placed_bytes = 4 * 256 * 3 + (plain.path / PREDICTORS).stat().st_size
    assert full.disk_needed_bytes - bare.disk_needed_bytes == pytest.approx(placed_bytes, abs=200)
    assert not list(tmp_path.glob("x*"))


def stop_at(monkeypatch: pytest.MonkeyPatch, call: str, jobs: int) -> None:
    """Stops after `jobs` jobs of a conversion, or before it is published."""
    real = getattr(Partial, call)

    def stopping(self: Partial, *args: Any) -> None:
        if call == "finish":
            real(self, *args)
        if len(self.done) >= jobs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, call, stopping)


def test_it_resumes_with_the_same_trace_and_starts_over_with_another(
    src: Path, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (write_trace(plain, tmp_path / f"{seed}.npz", seed) for seed in (0, 1))
    placed = tmp_path / "placed"
    convert(src, tmp_path / "whole", placement=first)
    stop_at(monkeypatch, "finish", 2)
    with pytest.raises(KeyboardInterrupt):
        convert(src, placed, placement=first)
    monkeypatch.undo()
    bundles = partial_of(placed) / "layers" / "000.bundles"
    written = bundles.stat().st_mtime_ns
    notes = Notes()
    convert(src, placed, notes, placement=first)
    assert "resuming" in notes.notes[0]
    assert notes.progress[0] == notes.progress[1]
    assert (placed / "layers" / "000.bundles").stat().st_mtime_ns == written
    assert Store.open(placed).id == Store.open(tmp_path / "whole").id

    stop_at(monkeypatch, "finish", 2)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "again", placement=first)
    monkeypatch.undo()
    notes = Notes()
    convert(src, tmp_path / "again", notes, placement=other)
    assert "starting over" in notes.notes[0]
    again = Store.open(tmp_path / "again")
    assert_placed(again, plain)
    assert again.id != Store.open(placed).id


def test_a_damaged_order_is_found(src: Path, plain: Store, tmp_path: Path) -> None:
    placed = tmp_path / "placed"
    convert(src, placed, placement=write_trace(plain, tmp_path / "trace.npz"))
    path = placed / order_file(1)
    whole = path.read_bytes()
    path.write_bytes(whole[4:8] + whole[4:])
    store = Store.open(placed)
    with pytest.raises(StoreError, match=r"001\.order is damaged: it does not name every neuron"):
        store.order(1)
    with pytest.raises(StoreError, match=r"001\.order is damaged"):
        store.check_digests()
    said = CliRunner().invoke(verify, [str(placed)])
    assert said.exit_code == 1
    assert "layers/001.order is damaged" in said.stdout
    path.write_bytes(whole[4:])
    with pytest.raises(StoreError, match=r"001\.order has 1,020 bytes, its manifest says 1,024"):
        Store.open(placed)
    path.write_bytes(whole)
    manifest = json.loads((placed / MANIFEST).read_text())
    manifest["files"] = [f for f in manifest["files"] if f["path"] != order_file(0)]
    (placed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"its manifest lacks layers/000\.order"):
        Store.open(placed)


def scores(store: Store, layer: int, kind: Kind) -> np.ndarray:
    """Of the same made-up features, whatever the store."""
    factors = read_predictors(store)[kind][layer]
    width = store.geometry.hidden * (AHEAD_PARTS if kind == "ahead" else 1)
    return factors.scores(np.random.default_rng(9).normal(size=(4, width)).astype(np.float32))


def test_predictors_come_along_and_name_the_same_neurons(
    src: Path, plain: Store, tmp_path: Path
) -> None:
    write_predictors(plain)
    traces = [write_trace(plain, tmp_path / f"{seed}.npz", seed) for seed in (0, 1)]
    notes = Notes()
    convert(src, tmp_path / "placed", notes, traces[0], plain.path)
    assert notes.progress[0] == notes.progress[1]
    placed = Store.open(tmp_path / "placed")
    for layer in range(plain.geometry.layers):
        for kind in KINDS:
            theirs, ours = scores(plain, layer, kind), scores(placed, layer, kind)
            assert np.array_equal(ours, theirs[:, placed.order(layer)])
    report = json.loads((placed.path / REPORT).read_text())
    assert report["layers"] == [{"layer": 0, "active": 0.25}]
    assert report["store"] == placed.id
    assert (placed.path / PICTURE).read_bytes() == b"a picture"
    assert CliRunner().invoke(verify, [str(placed.path)]).exit_code == 0
    # From one order into another, and back into the checkpoint's.
    convert(src, tmp_path / "other", placement=traces[1], predictors=placed.path)
    convert(src, tmp_path / "back", predictors=tmp_path / "other")
    before, after = (load_file(path / PREDICTORS) for path in (plain.path, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_predictors_are_there_however_the_conversion_was_stopped(
    src: Path, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_predictors(plain)
    trace, placed = write_trace(plain, tmp_path / "trace.npz"), tmp_path / "placed"
    stop_at(monkeypatch, "publish", 0)
    with pytest.raises(KeyboardInterrupt):
        convert(src, placed, placement=trace, predictors=plain.path)
    assert not placed.exists()
    monkeypatch.undo()
    convert(src, placed, placement=trace, predictors=plain.path)
    assert read_predictors(Store.open(placed)).keys() == set(KINDS)
    # Without them, what was written for them is no part of the store.
    stop_at(monkeypatch, "publish", 0)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "bare", placement=trace, predictors=plain.path)
    monkeypatch.undo()
    convert(src, tmp_path / "bare", placement=trace)
    assert verify_store(tmp_path / "bare").surplus == ()


def edited(plain: Store, name: str, tensor: str, folder: Path) -> Path:
    """A checkpoint that differs from the plain store's in one number."""
    src = make_checkpoint(folder / name, "opt", "float16")
    weights = load_file(src / "model.safetensors")
    weights[tensor].reshape(-1)[5] += 1
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    return src


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ("model.decoder.layers.1.fc1.weight", "other neurons in layer 1"),
        ("model.decoder.layers.2.fc2.weight", "other neurons in layer 2"),
        ("model.decoder.layers.0.fc1.bias", "other neurons in layer 0"),
        ("model.decoder.layers.0.fc2.bias", "other neurons in layer 0"),
        ("model.decoder.layers.0.self_attn.k_proj.weight", "other resident weights"),
    ],
)
def test_predictors_of_another_model_are_refused(
    tensor: str, reason: str, plain: Store, tmp_path: Path
) -> None:
    write_predictors(plain)
    other = edited(plain, "edited", tensor, tmp_path)
    trace = write_trace(plain, tmp_path / "trace.npz")
    with pytest.raises(StoreError, match=reason):
        convert(other, tmp_path / "placed", placement=trace, predictors=plain.path)
    assert not (tmp_path / "placed").exists()
    convert(other, tmp_path / "placed", placement=trace)  # what was converted is not lost
    assert not (tmp_path / "placed" / PREDICTORS).exists()


def test_a_store_without_good_predictors_is_refused_at_once(
    src: Path, plain: Store, tmp_path: Path
) -> None:
    def refused(reason: str, source: Path = src) -> None:
        with pytest.raises(StoreError, match=reason):
            convert(source, tmp_path / "placed", predictors=plain.path)
        assert not list(tmp_path.glob("placed*"))

    refused("has no predictors")
    write_predictors(plain)
    refused("another family", make_checkpoint(tmp_path / "llama", "llama-relu", "float16"))
    (plain.path / PREDICTORS).write_bytes((plain.path / PREDICTORS).read_bytes() + b"x")
    refused("is damaged")


def test_the_biases_file_is_the_only_resident_one_that_differs(
    src: Path, plain: Store, tmp_path: Path
) -> None:
    convert(src, tmp_path / "placed", placement=write_trace(plain, tmp_path / "trace.npz"))
    theirs, ours = ({e.path: e.sha256 for e in s.manifest.files}
                    for s in (plain, Store.open(tmp_path / "placed")))  # fmt: skip
    differ = {path for path in ours if ours[path] != theirs.get(path)}
    layers = {
        f"layers/{n:03}.{kind}" for n in range(3) for kind in ("bundles", "checksums", "order")
    }
    assert differ == layers | {BIASES}


def test_policies_count_the_reads_of_each_store(src: Path, plain: Store, tmp_path: Path) -> None:
    trace = write_trace(plain, tmp_path / "trace.npz")
    convert(src, tmp_path / "placed", placement=trace)
    stores = [str(plain.path), str(tmp_path / "placed")]
    options = ["--sizes", "20", "--scope", "use", "--policy", "decay 16", "--warmup", "10"]
    options += ["--store", stores[0], "--store", stores[1], "--json", str(tmp_path / "out.json")]
    said = CliRunner().invoke(policies, [str(trace), *options])
    assert said.exit_code == 0, said.output
    report = json.loads((tmp_path / "out.json").read_text())
    before, after = report["readings"]
    assert [before["store"], after["store"]] == stores
    (decay,) = (o for o in report["outcomes"] if o["policy"] == "decay 16")
    misses = decay["bytes_per_token"] / plain.geometry.stride_bytes
    assert (
        before["misses_per_token"] == after["misses_per_token"] == pytest.approx(misses, rel=0.01)
    )
    for reading, order_in in ((before, plain), (after, Store.open(tmp_path / "placed"))):
        reads = 0
        for layer in range(3):
            order = order_in.order(layer)
            found = missed(made_up_trace(plain), layer, 0.2)[10:]
            for row in found if order is None else found[:, order]:
                reads += int(row[0]) + int(np.count_nonzero(row[1:] & ~row[:-1]))
        assert reading["reads_per_token"] == pytest.approx(reads / 50)
        assert reading["bundles_per_read"] == pytest.approx(misses * 50 / reads, rel=0.01)
    assert after["bundles_per_read"] > 1.1 * before["bundles_per_read"]
    assert f"×{after['bundles_per_read']:.3f}" in said.stdout
    other = make_checkpoint(tmp_path / "llama", "llama-relu", "float16")
    convert(other, tmp_path / "other")
    said = CliRunner().invoke(policies, [str(trace), "--store", str(tmp_path / "other")])
    assert said.exit_code == 1
    assert "has 3 of 160" in " ".join(said.stderr.split())


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_any_bytes_of_a_reordered_tensor(rows: int, width: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(rows)))
    start = data.draw(st.integers(0, 2 * rows * width))
    end = data.draw(st.integers(start, 2 * rows * width))
    values = np.random.default_rng(0).integers(0, 256, (rows, 2 * width), np.uint8)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"offset" + values.tobytes())
        file.flush()
        shape = (rows, width)
        tensor = Tensor("t", Path(file.name), 6, "float16", shape, values.nbytes)
        read = bytearray(end - start)
        reordered(tensor, np.array(order, np.int32)).read_into(memoryview(read), start)
    assert bytes(read) == values[order].tobytes()[start:end]
    assert reordered(tensor, None) is tensor
