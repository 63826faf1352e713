"""The streamed model computes the reference's logits, and says what it saw on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.errors import StoreError
from common.model.families import family_named
from common.model.reference import load_reference
from common.model.streamed import Allowance, Bits, Bundles, load_streamed, run
from common.store.store import Store
from tests.checkpoints import VOCAB
from tests.conftest import Made

WINDOWS, LENGTH = 3, 20
STRIDE = 4096  # of every test store; its layers have 160 or 256 neurons
BLOCK = 48 * STRIDE  # a layer takes several, the last one shorter
RESIDENT = 4 * (4 * 64 * 64 + 4 * 64 + 4 * 64)  # of a layer of "opt": attention and norms
FFN = 4 * 2 * 256 * 64  # of the same, as float32
VARIANTS = ("opt", "opt-postln", "opt-nobias", "llama-relu2", "llama-fatrelu", "llama-mlp-bias")


def windows(count: int = WINDOWS, seed: int = 3) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(3, VOCAB, (count, LENGTH))


def logits(model: Any, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.from_numpy(ids)).logits.float()
    return found


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def reference_of(made: Made, variant: str, dtype: str = "float32") -> nn.Module:
    made.store(variant, dtype)
    return load_reference(made.checkpoint(variant, dtype), torch.float32)


def copy_of(store: Store, folder: Path) -> Store:
    shutil.copytree(store.path, folder / "copy")
    return Store.open(folder / "copy")


def damage(store: Store, layer: int, neuron: int) -> None:
    with store.bundle_path(layer).open("r+b") as file:
        file.seek(neuron * STRIDE + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["read-again", "kept"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_references(made: Made, variant: str, keep_bytes: int) -> None:
    model = load_streamed(made.store(variant), keep_bytes=keep_bytes, block_bytes=BLOCK)
    reference = reference_of(made, variant)
    for ids in windows(), windows(seed=4):
        assert largest_difference(logits(model, ids), logits(reference, ids)) <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 1e-4)])
@pytest.mark.parametrize("variant", ["opt", "llama-gqa"])
def test_half_precision_stores(made: Made, variant: str, dtype: str, tolerance: float) -> None:
    model = load_streamed(made.store(variant, dtype), block_bytes=BLOCK)
    expected = logits(reference_of(made, variant, dtype), windows())
    for _ in range(2):  # the layers as they are read, and as they are kept
        assert largest_difference(logits(model, windows()), expected) <= tolerance


class Seen:
    """An observer, and a reference that is watched at the same places."""

    def __init__(self, reference: nn.Module, model_type: str, first_weight: str):
        self.x: dict[int, torch.Tensor] = {}
        self.fired: dict[int, Bits] = {}
        self.expected_x: dict[int, torch.Tensor] = {}
        self.expected_z: dict[int, torch.Tensor] = {}
        layers: Any = reference.get_submodule(family_named(model_type).layers)
        layers[0].register_forward_pre_hook(self._enters, with_kwargs=True)
        for index, layer in enumerate(layers):
            layer.get_submodule(first_weight).register_forward_hook(self._multiplied(index))

    def __call__(self, layer: int, x: torch.Tensor, fired: Bits | None) -> None:
        assert layer not in self.x, "told twice in one pass"
        assert x.dtype == torch.float32
        self.x[layer] = x
        if fired is not None:
            self.fired[layer] = fired

    def _enters(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.expected_x[-1] = (args[0] if args else named["hidden_states"]).flatten(0, -2)

    def _multiplied(self, layer: int) -> Any:
        def after(_: nn.Module, args: tuple[torch.Tensor], z: torch.Tensor) -> None:
            self.expected_x[layer] = args[0].reshape(-1, args[0].shape[-1])
            self.expected_z[layer] = z.reshape(-1, z.shape[-1])

        return after


@pytest.mark.parametrize(
    ("variant", "first_weight", "threshold"),
    [
        ("opt-postln", "fc1", 0.0),
        ("opt", "fc1", 0.0),
        ("llama-fatrelu", "mlp.gate_proj", 0.01),
        ("llama-relu2", "mlp.gate_proj", 0.0),
    ],
)
def test_observers_see_what_the_reference_computes(
    made: Made, variant: str, first_weight: str, threshold: float
) -> None:
    store = made.store(variant)
    reference = reference_of(made, variant)
    seen = Seen(reference, store.family, first_weight)
    logits(load_streamed(store, seen, block_bytes=BLOCK), windows())
    logits(reference, windows())
    assert list(seen.x) == [-1, 0, 1, 2]
    assert list(seen.fired) == [0, 1, 2]
    for layer, x in seen.x.items():
        torch.testing.assert_close(x, seen.expected_x[layer], atol=1e-4, rtol=1e-4)
    for layer, fired in seen.fired.items():
        bits = np.unpackbits(fired, axis=1, bitorder="little").astype(bool)
        z = seen.expected_z[layer]
        assert bits.shape == z.shape
        clear = ((z - threshold).abs() > 1e-4).numpy()  # rounding decides the others
        assert clear.mean() > 0.99
        assert (bits == (z > threshold).numpy())[clear].all()


def test_the_first_layers_alone_see_the_same(made: Made) -> None:
    whole: dict[int, torch.Tensor] = {}
    part: dict[int, torch.Tensor] = {}
    store = made.store("llama-gqa")
    logits(load_streamed(store, lambda i, x, _: whole.update({i: x})), windows())
    logits(load_streamed(store, lambda i, x, _: part.update({i: x}), layers=2), windows())
    assert list(part) == [-1, 0, 1]
    for layer, x in part.items():
        assert torch.equal(x, whole[layer])


@pytest.mark.parametrize("neuron", [0, 200, 255])
def test_a_damaged_bundle_is_named(made: Made, tmp_path: Path, neuron: int) -> None:
    store = copy_of(made.store("opt"), tmp_path)
    damage(store, layer=1, neuron=neuron)
    model = load_streamed(store, keep_bytes=0, block_bytes=BLOCK)
    for _ in range(2):  # a layer that was never right is judged again
        with pytest.raises(StoreError, match=f"layer 1 neuron {neuron} .*inflash verify"):
            logits(model, windows())
        assert meta_layers(model) == [True] * 3


def meta_layers(model: Any) -> list[bool]:
    """Of each decoder layer: whether its parameters are on the meta device, all of them."""
    layers: Any = model.get_submodule(family_named(model.config.model_type).layers)
    found = [{p.is_meta for p in layer.parameters()} for layer in layers]
    assert all(len(kinds) == 1 for kinds in found)
    return [True in kinds for kinds in found]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("variant", ["opt", "opt-postln", "llama-gqa", "llama-tied"])
def test_layers_that_do_not_stay_compute_the_same(made: Made, variant: str, dtype: str) -> None:
    store = made.store(variant, dtype)
    kept: list[Any] = []
    streamed: list[Any] = []
    model = load_streamed(store, lambda *told: kept.append(told), block_bytes=BLOCK)
    assert meta_layers(model) == [False] * 3
    expected = [logits(model, windows(seed=seed)) for seed in (3, 4)]
    model = load_streamed(
        store, lambda *told: streamed.append(told), keep_bytes=0, block_bytes=BLOCK
    )
    for found, seed in zip(expected, (3, 4), strict=True):
        assert meta_layers(model) == [True] * 3
        assert torch.equal(logits(model, windows(seed=seed)), found)
    assert meta_layers(model) == [True] * 3
    layers = model.get_submodule(family_named(store.family).layers)
    within = {id(p) for p in layers.parameters()}
    assert not any(p.is_meta for p in model.parameters() if id(p) not in within)
    for (layer, x, bits), (same, same_x, same_bits) in zip(kept, streamed, strict=True):
        assert (layer, layer >= 0) == (same, bits is not None)
        assert torch.equal(x, same_x)
        assert np.array_equal(bits, same_bits)


def test_layers_are_kept_while_the_allowance_lasts(made: Made, tmp_path: Path) -> None:
    store = copy_of(made.store("opt"), tmp_path)
    keep_bytes = 3 * RESIDENT + 2 * FFN + 100
    model = load_streamed(store, block_bytes=BLOCK, keep_bytes=keep_bytes)
    assert meta_layers(model) == [False] * 3
    expected = logits(model, windows())
    for layer in 0, 1:
        store.bundle_path(layer).unlink()
    assert torch.equal(logits(model, windows()), expected)
    store.bundle_path(2).unlink()
    with pytest.raises(FileNotFoundError):
        logits(model, windows())


def test_resident_tensors_take_the_allowance_first(made: Made, tmp_path: Path) -> None:
    store = copy_of(made.store("opt"), tmp_path)
    model = load_streamed(store, block_bytes=BLOCK, keep_bytes=2 * RESIDENT + 100)
    assert meta_layers(model) == [False, False, True]
    expected = logits(model, windows())
    paths = store.resident_paths()
    for path in paths[:3]:
        path.unlink()
    assert torch.equal(logits(model, windows()), expected)
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{paths[3].name} is truncated"):
        logits(model, windows())
    assert meta_layers(model) == [False, False, True]


def test_a_streamed_layers_tensors_are_checked_before_it_runs(made: Made, tmp_path: Path) -> None:
    store = copy_of(made.store("opt"), tmp_path)
    path = store.resident_paths()[2]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(StoreError, match=f"lacks resident tensors: {name}$"):
        load_streamed(store, keep_bytes=0)
    save_file(tensors | {name: torch.zeros(7)}, path)
    with pytest.raises(StoreError, match=rf"{path.name}: .*k_proj.weight is float32 \[7\]"):
        load_streamed(store, keep_bytes=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_are_as_small_as_asked(made: Made, dtype: str) -> None:
    store = made.store("opt", dtype)
    bundles = Bundles(store, BLOCK, Allowance(0))
    expected = [torch.from_numpy(store.rows(1, part)) for part in store.geometry.parts]
    following = 0
    for first, block in bundles.blocks(1):
        assert first == following
        assert block.shape[1] * STRIDE <= BLOCK
        following = first + block.shape[1]
        for rows, part in zip(block, expected, strict=True):
            assert torch.equal(rows, part[first:following])
    assert following == store.geometry.neurons


@pytest.mark.parametrize("variant", ["opt-postln", "llama-gqa"])
def test_scores_are_those_of_the_references_logits(made: Made, variant: str) -> None:
    ids = windows(5)
    model = load_streamed(made.store(variant))
    found = list(run(model, ids, batch=2, logits_bytes=7 * 4 * VOCAB))
    assert [scores.first for scores in found] == [0, 2, 4]
    expected = logits(reference_of(made, variant), ids)
    nll = nn.functional.cross_entropy(
        expected[:, :-1].transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none"
    )
    torch.testing.assert_close(torch.cat([s.nll for s in found]), nll, atol=1e-3, rtol=1e-4)
    assert torch.equal(torch.cat([s.top for s in found]), expected.argmax(dim=2))
