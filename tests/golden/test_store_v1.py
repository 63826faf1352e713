"""Frozen stores of format version 1: the writer must make these bytes, the reader take them.

tests/golden/NAME/checkpoint is converted; tests/golden/NAME/store is what must come out. Should a
change alter them on purpose, it needs a new format version, and new fixtures beside these:
`python -m tests.golden.test_store_v1` writes those that are missing.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.model.convert import convert
from common.model.skeleton import meta_model
from common.replay import save_trace, trace_from_bits
from common.store.store import Store
from common.store.verify import verify_store
from tests.checkpoints import Variant, make_config

HERE = Path(__file__).parent
_SMALL = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL |= {"max_position_embeddings": 8}

# Folder -> shape, dtype, and the store's id: the first half of its manifest's SHA-256, and so a
# digest of every byte.
STORES = {
    "opt-float16": (Variant("opt", {"ffn_dim": 5, **_SMALL}), "float16", "6940280a08b7348b"),
    "llama-bfloat16": (
        Variant(
            "llama",
            {"intermediate_size": 3, "mlp_bias": True, "num_key_value_heads": 1, **_SMALL},
            {"hidden_act": "fatrelu", "hidden_act_param": 0.25},
        ),
        "bfloat16",
        "740c2f88a26c0967",
    ),
}
# The first store's checkpoint, placed by a trace: its folder, the store's id, and what each token
# asks of layers 0 and 1. In layer 0, neurons 3 and 0 come together, 2 and 4 do; nobody asks for 1.
PLACED, PLACED_ID = "opt-float16-placed", "fa7d2b5df46aade1"
ASKED = (([0, 3], [2, 4], [0, 3], [2, 4], [0, 3, 4]), ([1, 4], [0], [1, 4], [0], [2, 4]))


def write_trace(path: Path) -> None:
    bits = np.zeros((2, 5, 5), np.bool_)
    for layer, tokens in enumerate(ASKED):
        for token, ids in enumerate(tokens):
            bits[layer, token, ids] = True
    save_trace(trace_from_bits(list(bits), 5, 4096), path)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("name", STORES)
def test_the_writer_makes_these_bytes(name: str, tmp_path: Path) -> None:
    convert(HERE / name / "checkpoint", tmp_path / "store")
    assert files(tmp_path / "store") == files(HERE / name / "store")


@pytest.mark.parametrize("name", STORES)
def test_the_reader_takes_them(name: str) -> None:
    store = Store.open(HERE / name / "store")
    assert store.id == STORES[name][2]
    assert verify_store(store.path).problems == ()


def test_what_lies_in_a_bundle() -> None:
    store = Store.open(HERE / "llama-bfloat16" / "store")
    # Weights count up through the checkpoint's sorted tensors: see make_frozen_checkpoint.
    assert store.activation.threshold == 0.25
    gate, up, down = (store.rows(1, part)[2] for part in ("gate", "up", "down"))
    bundle = np.fromfile(store.bundle_path(1), "<u2")[2 * 2048 : 3 * 2048]
    floats = (bundle.astype(np.uint32) << 16).view(np.float32)
    assert floats[:24].tolist() == [*gate, *up, *down]
    assert not floats[24:].any()
    assert hashlib.sha256(bundle.tobytes()).hexdigest()[:16] == "0e674bbd7f06bd5d"


def test_a_placed_store(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.npz")
    source = HERE / "opt-float16" / "checkpoint"
    convert(source, tmp_path / "store", placement=tmp_path / "trace.npz")
    assert files(tmp_path / "store") == files(HERE / PLACED / "store")
    store, plain = Store.open(HERE / PLACED / "store"), Store.open(HERE / "opt-float16" / "store")
    assert store.id == PLACED_ID
    assert verify_store(store.path).problems == ()
    assert (plain.order(0), plain.order(1)) == (None, None)
    orders = [store.order(0), store.order(1)]
    assert [order.tolist() for order in orders if order is not None] == [
        [0, 3, 2, 4, 1],
        [0, 1, 4, 2, 3],
    ]
    for layer, order in enumerate(orders):
        for part in ("up", "down"):
            assert np.array_equal(store.rows(layer, part), plain.rows(layer, part)[order])
        assert np.array_equal(store.biases(layer)["up"], plain.biases(layer)["up"][order])
        assert np.array_equal(store.biases(layer)["down"], plain.biases(layer)["down"])


def make_frozen_checkpoint(folder: Path, variant: Variant, dtype: str) -> None:
    """A checkpoint whose values are a fixed sequence, exact in any 16-bit float."""
    config = make_config(Variant(variant.family))
    config = type(config)(**(config.to_diff_dict() | variant.config))
    folder.mkdir(parents=True)
    count, tensors = 0, {}
    shapes = meta_model(config, torch.float32).state_dict()
    for name in sorted(shapes):
        size = shapes[name].numel()
        values = (torch.arange(count, count + size) * 37 % 255 - 127) / 128
        tensors[name] = values.reshape(shapes[name].shape).to(getattr(torch, dtype))
        count += size
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    content = config.to_diff_dict() | variant.written
    content.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}\n')


if __name__ == "__main__":
    for store_name, (shape, number_format, _) in STORES.items():
        if not (HERE / store_name).exists():
            make_frozen_checkpoint(HERE / store_name / "checkpoint", shape, number_format)
            convert(HERE / store_name / "checkpoint", HERE / store_name / "store")
            print(store_name, Store.open(HERE / store_name / "store").id)
    if not (HERE / PLACED).exists():
        with tempfile.TemporaryDirectory() as scratch:
            write_trace(Path(scratch) / "trace.npz")
            checkpoint = HERE / "opt-float16" / "checkpoint"
            convert(checkpoint, HERE / PLACED / "store", placement=Path(scratch) / "trace.npz")
            print(PLACED, Store.open(HERE / PLACED / "store").id)
