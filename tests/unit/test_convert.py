"""Conversion: the bytes of every variant, format and dtype, and every refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import common.model.bundling as bundling
from common.errors import StoreError, UserError
from common.model.convert import convert, plan_conversion
from common.model.families import TRANSPOSED, family_named
from common.store.checksum import bundle_checksum
from common.store.geometry import DTYPE_BYTES, Geometry
from common.store.partial import Partial, partial_of
from common.store.store import Store
from common.store.tensors import Tensor, to_float32
from common.store.verify import verify_store
from scripts.convert import main
from tests.checkpoints import VARIANTS, make_checkpoint

FORMATS = {
    "single": {},
    "sharded": {"sharded": True},
    "pickled": {"pickled": True},
    "pickled and sharded": {"pickled": True, "sharded": True},
}


def source_weights(src: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, by the libraries that wrote them."""
    weights: dict[str, torch.Tensor] = {}
    for path in src.glob("*.safetensors"):
        weights |= load_file(path)
    for path in src.glob("*.bin"):
        weights |= torch.load(path, weights_only=True)
    return weights


def raw(tensor: torch.Tensor) -> np.ndarray:
    """uint8 [rows, bytes of a row]."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(len(tensor), -1)


def assert_store_holds(store: Store, weights: dict[str, torch.Tensor]) -> None:
    geometry, family = store.geometry, family_named(store.family)
    names = set(weights)
    for layer in range(geometry.layers):
        bundles = np.fromfile(store.bundle_path(layer), np.uint8)
        bundles = bundles.reshape(geometry.neurons, geometry.stride_bytes)
        parts = []
        for part in geometry.parts:
            name = family.tensor(layer, part)
            names.discard(name)
            weight = weights[name].T if part == TRANSPOSED else weights[name]
            parts.append(raw(weight))
            assert np.array_equal(store.rows(layer, part), weight.float().numpy())
            bias = weights.get(family.tensor(layer, part, "bias"))
            names.discard(family.tensor(layer, part, "bias"))
            stored = store.biases(layer).get(part)
            assert (stored is None) == (bias is None)
            assert bias is None or np.array_equal(stored, bias.float().numpy())
        expected = np.concatenate(parts, axis=1)
        assert np.array_equal(bundles[:, : geometry.bundle_bytes], expected)
        assert not bundles[:, geometry.bundle_bytes :].any()
        assert [bundle_checksum(b) for b in bundles] == store.checksums(layer).tolist()
    resident: dict[str, torch.Tensor] = {}
    for path in store.resident_paths():
        resident |= load_file(path)
    assert resident.keys() == names
    assert all(torch.equal(resident[name], weights[name]) for name in names)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_byte_of_every_variant(variant: str, dtype: str, tmp_path: Path) -> None:
    # Each variant sees each dtype, and each format comes by in turn.
    turn = list(VARIANTS).index(variant) + list(DTYPE_BYTES).index(dtype)
    kind = list(FORMATS.values())[turn % len(FORMATS)]
    src = make_checkpoint(tmp_path / "src", variant, dtype, **kind)
    convert(src, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.geometry.dtype == dtype
    assert_store_holds(store, source_weights(src))
    found = verify_store(store.path)
    assert (found.problems, found.surplus) == ((), ())
    assert AutoConfig.from_pretrained(store.config_dir).model_type == store.family


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_makes_the_same_bundles(kind: str, tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt", "float16", **FORMATS[kind])
    convert(src, tmp_path / "store")
    assert_store_holds(Store.open(tmp_path / "store"), source_weights(src))


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    (src / "pytorch_model.bin").write_bytes(b"not read")
    convert(src, tmp_path / "store")
    assert Store.open(tmp_path / "store").manifest.source_files == ("model.safetensors",)


@pytest.mark.parametrize("change", ["without", "doubled"])
def test_old_names_with_and_without_the_leading_model(change: str, tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt", "float16")
    weights = load_file(src / "model.safetensors")
    renamed = {
        n.removeprefix("model.") if change == "without" else f"model.{n}": w
        for n, w in weights.items()
    }
    save_file(renamed, src / "model.safetensors")
    convert(src, tmp_path / "store")
    assert_store_holds(Store.open(tmp_path / "store"), weights)


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    (src / "generation_config.json").unlink()
    convert(src, tmp_path / "store")
    config = Store.open(tmp_path / "store").config_dir
    text = "def größe(x):\n\treturn 'é'"
    before, after = AutoTokenizer.from_pretrained(src), AutoTokenizer.from_pretrained(config)
    assert before.encode(text) == after.encode(text)
    assert (config / "tokenizer.json").is_file()
    assert json.loads((config / "generation_config.json").read_text())["eos_token_id"] == 2


def test_without_tokenizer_it_says_so(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    for path in src.glob("tokenizer*"):
        path.unlink()
    result = CliRunner().invoke(main, [str(src), str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    assert "no tokenizer: the store will take token ids only" in result.stderr.replace("\n", " ")
    assert Store.open(tmp_path / "store").config_dir.is_dir()


def test_code_of_the_checkpoint_is_not_named_in_the_store(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    edit_config(src, auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    convert(src, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert "auto_map" not in (store.config_dir / "config.json").read_text()


def test_tied_tensor_under_either_name_or_both(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "llama-tied")
    weights = load_file(src / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for number, change in enumerate(
        [{"lm_head.weight": embedding.clone()}, {"lm_head.weight": embedding, "gone": True}]
    ):
        changed: dict[str, Any] = weights | change
        if changed.pop("gone", False):
            del changed["model.embed_tokens.weight"]
        save_file(changed, src / "model.safetensors")
        convert(src, tmp_path / f"store{number}")
        assert_store_holds(Store.open(tmp_path / f"store{number}"), weights)
    save_file(weights | {"lm_head.weight": embedding + 1}, src / "model.safetensors")
    with pytest.raises(StoreError, match=r"ties lm_head\.weight to .* but they differ"):
        convert(src, tmp_path / "store2")


def edit_config(src: Path, **changes: Any) -> None:
    path = src / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(src: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(src / "model.safetensors")
    for name, value in changes.items():
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, src / "model.safetensors")


LAYER = "model.layers.1.mlp"
REFUSALS: dict[str, tuple[Any, str]] = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda s: (s / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{"), "is no JSON"),
    "config is a list": (lambda s: (s / "config.json").write_text("[]"), "no JSON object"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "has no weights"),
    "family": (lambda s: edit_config(s, model_type="mistral"), "'mistral' is not supported"),
    "no family": (lambda s: edit_config(s, model_type=None), "None is not supported"),
    "silu": (lambda s: edit_config(s, hidden_act="silu"), "'silu'.*every neuron"),
    "quantised": (lambda s: edit_config(s, quantization_config={"bits": 4}), "quantised already"),
    "bad config value": (lambda s: edit_config(s, hidden_size="x"), "refused by transformers"),
    "bad heads": (lambda s: edit_config(s, num_attention_heads=7), "refused by transformers"),
    "missing": (
        lambda s: edit_weights(s, **{f"{LAYER}.up_proj.weight": None}),
        r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight \(shape \[160, 64\]\)",
    ),
    "many missing": (lambda s: edit_config(s, num_hidden_layers=5), r"lacks 18 tensors: .* more"),
    "misshapen": (
        lambda s: edit_weights(s, **{f"{LAYER}.down_proj.weight": torch.zeros(160, 64)}),
        r"down_proj\.weight has shape \[160, 64\], expected \[64, 160\]",
    ),
    "misshapen embedding": (
        lambda s: edit_weights(s, **{"model.embed_tokens.weight": torch.zeros(300, 63)}),
        r"embed_tokens\.weight has shape \[300, 63\], expected \[300, 64\]",
    ),
    "dtype": (
        lambda s: edit_weights(s, **{f"{LAYER}.up_proj.weight": torch.zeros(160, 64).double()}),
        r"up_proj\.weight is F64; supported are float16, bfloat16, float32",
    ),
    "several dtypes": (
        lambda s: edit_weights(s, **{f"{LAYER}.up_proj.weight": torch.zeros(160, 64).half()}),
        r"one dtype.*float16: model\.layers\.1\.mlp\.up_proj",
    ),
    "truncated": (
        lambda s: truncate(s / "model.safetensors", -1),
        "is truncated: .* bytes, its header promises",
    ),
    "truncated header": (lambda s: truncate(s / "model.safetensors", 100), "is truncated"),
    "empty": (lambda s: truncate(s / "model.safetensors", 0), "is truncated"),
    "corrupt header": (
        lambda s: (s / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"\xff" * 64),
        "corrupt safetensors header",
    ),
    "shard that is not there": (
        lambda s: make_index(s, {"weight_map": {"a": "model-1.safetensors"}}),
        r"names model-1\.safetensors, which is not in the folder",
    ),
    "index without map": (
        lambda s: make_index(s, {}),
        "has no weight_map",
    ),
    "broken tokenizer": (
        lambda s: (s / "tokenizer.json").write_text("{"),
        "tokenizer in .* cannot be loaded",
    ),
}


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def make_index(src: Path, content: dict[str, Any]) -> None:
    (src / "model.safetensors").unlink()
    (src / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_reason_and_write_no_store(case: str, tmp_path: Path) -> None:
    change, reason = REFUSALS[case]
    src = make_checkpoint(tmp_path / "src", "llama-relu")
    change(src)
    with pytest.raises(UserError, match=reason):
        convert(src, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    result = CliRunner().invoke(main, [str(src), str(tmp_path / "store")])
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: truncate(p, -200), "is truncated, or was written by torch before 1.6"),
        (lambda p: truncate(p, 0), "is truncated, or was"),
        (lambda p: torch.save({"a": print}, p), "not weights only"),
        (
            lambda p: torch.save({"a": torch.zeros(2)}, p, _use_new_zipfile_serialization=False),
            "by torch before 1.6",
        ),
        (lambda p: torch.save([1], p), "holds no tensors by name"),
        (
            lambda p: torch.save({"a": torch.zeros(2, 3).T}, p),
            "a is stored transposed",
        ),
    ],
)
def test_pickled_weights_that_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt", pickled=True)
    change(src / "pytorch_model.bin")
    with pytest.raises(StoreError, match=reason):
        convert(src, tmp_path / "store")


def test_existing_destination_and_too_little_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    (tmp_path / "store").mkdir()
    with pytest.raises(StoreError, match="exists already"):
        convert(src, tmp_path / "store")
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 4096, 4096))
    with pytest.raises(StoreError, match=r"too little disk at .*: [\d,]+ bytes needed, 4,096 free"):
        convert(src, tmp_path / "new" / "store")
    assert not (tmp_path / "new").exists()


def test_dry_run_tells_and_writes_nothing(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "llama-fatrelu", "bfloat16")
    dst = tmp_path / "store"
    table = CliRunner().invoke(main, [str(src), str(dst), "--dry-run"])
    for text in ("llama", "fatrelu above 0.01", "160 a layer", "384 bytes", "4,096", "90.6%"):
        assert text in table.stdout
    plan = json.loads(CliRunner().invoke(main, [str(src), str(dst), "--dry-run", "--json"]).stdout)
    assert plan["ffn_bytes"] == 3 * 160 * 4096
    assert plan["dtype"] == "bfloat16"
    assert not list(tmp_path.glob("store*"))
    convert(src, dst)
    written = sum(p.stat().st_size for p in dst.rglob("*") if p.is_file())
    assert written <= plan["disk_needed_bytes"]
    assert Store.open(dst).resident_bytes == plan["resident_bytes"]
    assert plan_conversion(src, tmp_path / "other").ffn_bytes == Store.open(dst).geometry.ffn_bytes


def test_command_ends_with_a_line_and_json(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    said = CliRunner().invoke(main, [str(src), str(tmp_path / "a")])
    assert "GB/s" in said.stdout
    assert f"inflash serve {tmp_path / 'a'}" in said.stdout
    result = json.loads(CliRunner().invoke(main, [str(src), str(tmp_path / "b"), "--json"]).stdout)
    assert result["id"] == Store.open(tmp_path / "b").id == Store.open(tmp_path / "a").id


def test_ctrl_c_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = make_checkpoint(tmp_path / "src", "opt"), tmp_path / "store"
    finish = Partial.finish

    def interrupted(self: Partial, job: str, entries: list[Any]) -> None:
        finish(self, job, entries)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "finish", interrupted)
    result = CliRunner().invoke(main, [str(src), str(dst)])
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.stderr
    assert not dst.exists()
    assert partial_of(dst).is_dir()
    monkeypatch.undo()
    result = CliRunner().invoke(main, [str(src), str(dst)])
    assert result.exit_code == 0
    assert "resuming: 2," in result.stderr
    assert not partial_of(dst).exists()


@settings(max_examples=60, deadline=None)
@given(
    neurons=st.integers(1, 40),
    hidden=st.integers(1, 70),
    gated=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block=st.integers(1, 50_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_bundling_is_the_same_in_any_block_size(
    neurons: int, hidden: int, gated: bool, dtype: str, block: int, seed: int, tmp_path_factory: Any
) -> None:
    geometry = Geometry(1, neurons, hidden, gated, dtype)
    random, item = np.random.default_rng(seed), geometry.item_bytes
    path = tmp_path_factory.mktemp("bundling") / "weights"
    matrices, tensors, raw_file = {}, {}, b"offset"
    for part in geometry.parts:
        matrix = random.integers(0, 256, (neurons, hidden, item), np.uint8)
        matrices[part] = matrix
        stored = matrix.swapaxes(0, 1) if part == TRANSPOSED else matrix
        tensors[part] = Tensor(part, path, len(raw_file), dtype, stored.shape[:2], matrix.nbytes)
        raw_file += stored.tobytes()
    path.write_bytes(raw_file)
    written = bytearray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundling, "BLOCK_BYTES", block)
        checksums, loss = bundling.write_bundles(tensors, geometry, written.extend)
    bundles = np.frombuffer(written, np.uint8).reshape(neurons, geometry.stride_bytes)
    flat = [matrices[part].reshape(neurons, -1) for part in geometry.parts]
    assert np.array_equal(bundles[:, : geometry.bundle_bytes], np.concatenate(flat, axis=1))
    assert checksums.tolist() == [bundle_checksum(bundle) for bundle in bundles]
    assert loss is None, "nothing is packed"


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_to_float32_is_torchs(dtype: str) -> None:
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    values = values.to(getattr(torch, dtype))
    assert np.array_equal(to_float32(raw(values), dtype), values.float().numpy())
