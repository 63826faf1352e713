"""The model without its FFN, its resident tensors, and the reference it is compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from common.errors import StoreError
from common.model.convert import convert
from common.model.families import family_named
from common.model.reference import load_reference
from common.model.skeleton import build_skeleton, fill, find_resident
from common.store.store import Store
from tests.checkpoints import VARIANTS, make_checkpoint


class StoreFFN(nn.Module):
    """The FFN in plain torch, over what the store holds: proves the bundles, not our kernels."""

    def __init__(self, store: Store, layer: int):
        super().__init__()
        self.activation = store.activation
        self.parts = {p: torch.from_numpy(store.rows(layer, p)) for p in store.geometry.parts}
        self.biases = {p: torch.from_numpy(b) for p, b in store.biases(layer).items()}

    def pre(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.parts[part], self.biases.get(part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.pre("gate" if "gate" in self.parts else "up", x)
        h = torch.where(z > self.activation.threshold, z, 0.0)
        h = h.square() if self.activation.name == "relu2" else h
        h = h * self.pre("up", x) if "gate" in self.parts else h
        return h @ self.parts["down"] + self.biases.get("down", torch.zeros(()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_skeleton_with_the_stores_ffn_computes_the_references_logits(
    variant: str, tmp_path: Path
) -> None:
    dtype = "float16" if variant in ("opt", "llama-gqa") else "float32"
    src = make_checkpoint(tmp_path / "src", variant, dtype)
    convert(src, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    config = AutoConfig.from_pretrained(store.config_dir)
    model: Any = build_skeleton(config, lambda i: StoreFFN(store, i), torch.float32, "sdpa")
    fill(model, find_resident(model, store.resident_paths()))
    model.tie_weights()
    reference = load_reference(src, torch.float32)
    ids = torch.randint(3, 300, (1, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = reference(ids).logits, model(ids).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == bool(config.tie_word_embeddings)


def skeleton_of(folder: Path, variant: str = "opt") -> tuple[Any, Path]:
    src = make_checkpoint(folder / "src", variant)
    convert(src, folder / "store")
    store = Store.open(folder / "store")
    config = AutoConfig.from_pretrained(store.config_dir)
    model = build_skeleton(config, lambda _: nn.Identity(), torch.bfloat16)
    return model, folder / "store"


def test_no_ffn_parameter_is_ever_there_and_all_others_are_meta(tmp_path: Path) -> None:
    model, _ = skeleton_of(tmp_path, "llama-mlp-bias")
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not any("mlp" in name for name, _ in model.named_parameters())
    layer = model.get_submodule(family_named("llama").layers)[0]
    assert isinstance(layer.mlp, nn.Identity)


def test_resident_tensors_take_the_skeletons_dtype(tmp_path: Path) -> None:
    model, store = skeleton_of(tmp_path)
    fill(model, find_resident(model, Store.open(store).resident_paths()))
    model.tie_weights()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.decoder.embed_positions.weight"), "lacks .*embed_positions"),
        (lambda t: t.update(surplus=torch.zeros(1)), "surplus is not expected"),
        (
            lambda t: t.update({"model.decoder.final_layer_norm.bias": torch.zeros(7)}),
            r"final_layer_norm.bias is float32 \[7\], expected shape \[64\]",
        ),
    ],
)
def test_resident_files_that_do_not_fit_are_refused(
    change: Any, reason: str, tmp_path: Path
) -> None:
    model, store = skeleton_of(tmp_path)
    paths = Store.open(store).resident_paths()
    tensors = load_file(paths[0])
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(StoreError, match=reason):
        find_resident(model, [tmp_path / "changed.safetensors", *paths[1:]])


def test_reference_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no config\.json"):
        load_reference(tmp_path, torch.float32)
