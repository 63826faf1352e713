"""Opening and verifying a store, and the files that it is made of."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from common.errors import StoreError
from common.model.convert import convert
from common.store.manifest import MANIFEST, Manifest
from common.store.store import Store
from common.store.tensors import make_header, read_float32, read_header
from common.store.verify import verify_store
from scripts.verify import main
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    convert(make_checkpoint(folder / "src", "opt", "float16"), folder / "store")
    return folder / "store"


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "store")
    return tmp_path / "store"


def edit_manifest(store: Path, edit: Any) -> None:
    content = json.loads((store / MANIFEST).read_text())
    edit(content)
    (store / MANIFEST).write_text(json.dumps(content))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def drop_file(content: dict[str, Any], path: str) -> None:
    content["files"] = [f for f in content["files"] if f["path"] != path]


REFUSALS: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "there is no store at .*: no such folder"),
    "no manifest": (lambda s: (s / MANIFEST).unlink(), r"is no store: it has no manifest\.json"),
    "no JSON": (lambda s: (s / MANIFEST).write_text("{"), "is no store manifest"),
    "a list": (lambda s: (s / MANIFEST).write_text("[]"), "is no store manifest"),
    "binary": (lambda s: (s / MANIFEST).write_bytes(b"\xff\x00"), "is no store manifest"),
    "version": (
        lambda s: edit_manifest(s, lambda c: c.update(version=2)),
        "has format version 2, this inflash reads 1",
    ),
    "format": (lambda s: edit_manifest(s, lambda c: c.update(format="x")), "its format is 'x'"),
    "no field": (lambda s: edit_manifest(s, lambda c: c.pop("geometry")), "it has no 'geometry'"),
    "type": (
        lambda s: edit_manifest(s, lambda c: c["geometry"].update(hidden="64")),
        "hidden is '64', no int",
    ),
    "number format": (
        lambda s: edit_manifest(s, lambda c: c["number_format"].update(kind="int4")),
        "number format 'int4' is not known",
    ),
    "stride": (
        lambda s: edit_manifest(s, lambda c: c["bundle"].update(stride_bytes=512)),
        "does not follow from the geometry",
    ),
    "path outside": (
        lambda s: edit_manifest(s, lambda c: c["files"][0].update(path="../x")),
        "lies outside of the store",
    ),
    "file gone": (
        lambda s: (s / "layers/001.bundles").unlink(),
        r"is damaged: layers/001\.bundles is missing",
    ),
    "file longer": (
        lambda s: append(s / "resident/model.safetensors"),
        r"model\.safetensors has [\d,]+ bytes, its manifest says",
    ),
    "file not named": (
        lambda s: edit_manifest(s, lambda c: drop_file(c, "layers/002.checksums")),
        r"its manifest lacks layers/002\.checksums",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_whole_store_does_not_open(case: str, store: Path) -> None:
    change, reason = REFUSALS[case]
    change(store)
    with pytest.raises(StoreError, match=reason):
        Store.open(store)


def test_partial_store_and_checkpoint_do_not_open(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "x.partial")
    with pytest.raises(StoreError, match="unfinished conversion"):
        Store.open(tmp_path / "x.partial")
    with pytest.raises(StoreError, match="looks like a checkpoint: `inflash convert"):
        Store.open(pristine.parent / "src")


def test_what_an_open_store_says(pristine: Path) -> None:
    store = Store.open(pristine)
    assert (store.family, store.activation.name, store.geometry.gated) == ("opt", "relu", False)
    assert len(store.id) == 16
    assert int(store.id, 16) >= 0
    assert store.checksums(0).shape == (256,)
    assert store.checksums(0).dtype == np.uint64
    assert store.rows(2, "up").dtype == np.float32
    assert store.biases(1)["down"].shape == (64,)
    assert all(path.is_file() for path in store.resident_paths())
    assert len(store.resident_paths()) == 4


def test_opening_imports_no_torch(pristine: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from common.store.store import Store;"
        f"s = Store.open(Path({str(pristine)!r})); s.rows(0, 'up'); s.biases(0);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_verify_names_each_bad_bundle(store: Path) -> None:
    flip(store / "layers/000.bundles", 0)
    flip(store / "layers/002.bundles", 17 * 4096 + 4095)  # padding is covered too
    flip(store / "layers/002.bundles", 255 * 4096)
    texts = [problem.text for problem in verify_store(store).problems]
    assert texts == [
        "layer 0 neuron 0 (layers/000.bundles, bytes 0-4095) is damaged",
        "layer 2 neuron 17 (layers/002.bundles, bytes 69632-73727) is damaged",
        "layer 2 neuron 255 (layers/002.bundles, bytes 1044480-1048575) is damaged",
    ]


def test_every_file_is_covered(store: Path) -> None:
    names = [entry.path for entry in Store.open(store).manifest.files]
    generator = random.Random(5)
    for name in names:
        before = (store / name).read_bytes()
        flip(store / name, generator.randrange(len(before)))
        problems = verify_store(store).problems
        assert [problem.path for problem in problems] == [name]
        (store / name).write_bytes(before)
    assert verify_store(store).problems == ()


def test_bundles_and_checksums_changed_together_are_found_by_the_digest(store: Path) -> None:
    flip(store / "layers/001.bundles", 5)
    flip(store / "layers/001.checksums", 3)
    paths = [problem.path for problem in verify_store(store).problems]
    assert paths == ["layers/001.bundles", "layers/001.checksums"]


def test_verify_command(store: Path) -> None:
    good = CliRunner().invoke(main, [str(store)])
    assert good.exit_code == 0
    assert "every byte is right" in good.stdout
    (store / "resident/layer-000.safetensors").unlink()
    append(store / "layers/001.bundles")
    flip(store / "layers/000.bundles", 4096)
    (store / "notes.txt").write_text("mine")
    bad = CliRunner().invoke(main, [str(store)])
    assert bad.exit_code == 1
    for text in (
        "layer 0 neuron 1 (layers/000.bundles, bytes 4096-8191)",
        "layers/001.bundles has 1,048,577 bytes",
        "resident/layer-000.safetensors is missing",
        "notes.txt is no part of the store",
        "3 problems",
    ):
        assert text in bad.stdout
    found = json.loads(CliRunner().invoke(main, [str(store), "--json"]).stdout)
    assert found["surplus"] == ["notes.txt"]
    assert {"layer": 0, "neuron": 1, "first_byte": 4096, "last_byte": 8191}.items() <= found[
        "problems"
    ][-1].items()
    none = CliRunner().invoke(main, [str(store / "nothing")])
    assert none.exit_code == 1
    assert "no such folder" in none.stderr


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["float16", "float32"]), SHAPES),
        max_size=5,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_our_safetensors_are_the_librarys(
    tensors: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "ours.safetensors"
    values = {
        name: np.random.default_rng(seed).random(shape).astype(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    header = make_header((n, d, s) for n, (d, s) in tensors.items())
    path.write_bytes(header + b"".join(v.tobytes() for v in values.values()))
    assert len(header) % 8 == 0
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
    theirs = path.with_name("theirs.safetensors")
    save_file(values, theirs)
    for file in (path, theirs):
        read = {name: read_float32(t) for name, t in read_header(file).items()}
        assert all(np.array_equal(read[name], v.astype(np.float32)) for name, v in values.items())


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), size=st.integers(0, 300))
def test_any_other_bytes_are_refused_as_safetensors(
    content: bytes, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    for raw in (content, size.to_bytes(8, "little") + content):
        path.write_bytes(raw)
        try:
            tensors = read_header(path)
        except StoreError:
            continue
        assert tensors == {}  # a header of "{}" is a file without tensors


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in items:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += leaves(child, (*path, key))
    return found


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_changed_manifest_is_read_or_refused(data: Any, pristine: Path) -> None:
    content = json.loads((pristine / MANIFEST).read_text())
    *parents, last = data.draw(st.sampled_from(leaves(content)))
    target = content
    for key in parents:
        target = target[key]
    values = st.none() | st.integers(-2, 10**6) | st.text() | st.lists(st.none()) | st.floats()
    target[last] = data.draw(values)
    try:
        manifest = Manifest.from_json(json.dumps(content).encode(), pristine)
    except StoreError:
        return
    assert Manifest.from_json(manifest.to_json(), pristine) == manifest
