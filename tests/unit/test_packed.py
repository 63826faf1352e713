"""Packed rows: what they stand for, products from them, stores of them, and the plan for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import Settings
from common.errors import SettingError, StoreError
from common.integer_dot import CHUNK, LARGEST
from common.kernels import BITS
from common.model.convert import convert, plan_conversion
from common.model.streamed import Allowance, Bundles
from common.packed import Floats, packed, unpacked
from common.plan import make_plan
from common.store.geometry import GROUP, PACKED, SCALED, Geometry, row_bytes
from common.store.manifest import MANIFEST
from common.store.store import Store
from common.store.tensors import read_float32, read_header
from common.store.verify import verify_store
from services.compute.linear import RowLinear, Rows, choose_int8, multiply_rows, pack, rows_of
from services.compute.products import FEW, SHARED_BYTES_MIN, Products
from services.compute.rows import CacheRows
from tests.checkpoints import VARIANTS, Variant, make_checkpoint
from tests.conftest import Made

SPANS = st.sampled_from([1e-6, 1e-3, 1.0, 300.0])


def rows_like(seed: int, count: int, groups: int, span: float) -> Floats:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, groups * GROUP)) * span).astype(np.float32)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6), SPANS)
@settings(deadline=None, max_examples=40)
def test_a_number_is_off_by_no_more_than_its_steps(
    seed: int, count: int, groups: int, span: float
) -> None:
    rows = rows_like(seed, count, groups, span)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    off = np.abs(unpacked(packed(rows, "int8"), "int8", rows.shape[1]) - rows)
    step = largest / 127 * (1 + 2**-7)
    assert (off[:, SCALED:] <= step * 0.501).all()
    assert (off[:, :SCALED] <= step * 1.501).all()
    found = unpacked(packed(rows, "int4"), "int4", rows.shape[1])
    lost = np.square(found - rows).sum() / np.square(rows).sum()
    assert lost < 0.11**2 or span < 1e-5  # float16 scales end at 6e-8


@given(st.integers(0, 99), st.integers(1, 4), SPANS)
@settings(deadline=None, max_examples=30)
def test_int4_loses_less_than_the_nearest_of_sixteen(seed: int, groups: int, span: float) -> None:
    """Than sixteen numbers from a group's smallest to its largest value."""
    rows = rows_like(seed, 8, groups, max(span, 1e-3))
    values = rows.reshape(-1, GROUP)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    step = (high - low) / 15
    plain = np.square(np.rint((values - low) / step) * step + low - values).sum()
    found = unpacked(packed(rows, "int4"), "int4", rows.shape[1])
    assert np.square(found - rows).sum() < plain * 1.001


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize("value", [0.0, -3.0, 0.5])
def test_rows_of_one_value(number_format: str, value: float) -> None:
    rows = np.full((3, 64), value, np.float32)
    found = unpacked(packed(rows, number_format), number_format, 64)
    np.testing.assert_allclose(found, rows, rtol=0.013)


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 10_000])
def test_products(number_format: str, threads: int, count: int) -> None:
    hidden, random = 32 * 33, np.random.default_rng(count)
    geometry = Geometry(1, count + 3, hidden, False, "float32", number_format)
    rows = random.standard_normal((2, count + 3, hidden)).astype(np.float32)
    region = np.zeros((count + 3, geometry.stride_bytes), np.uint8)
    stand_for = []
    for index, part in enumerate(rows):
        raw, begin = packed(part, number_format), index * geometry.row_bytes
        region[:, begin : begin + geometry.row_bytes] = raw
        stand_for.append(unpacked(raw, number_format, hidden))
    cached = CacheRows(bytearray(region), geometry, Products(threads))
    slots = torch.randperm(count + 3)[:count].numpy()
    x, weights = torch.randn(hidden), torch.randn(count)
    up, down = (torch.from_numpy(part[slots]) for part in stand_for)
    step = x.abs().max() / LARGEST  # of the rounded vector
    error = step * up.abs().sum(dim=1) / 2 + 1e-5 * hidden**0.5
    made = torch.from_numpy(cached.dot("up", slots, cached.vectors(x[None])))
    assert ((made[0] - up @ x).abs() <= error).all()
    out = torch.ones(1, hidden)
    cached.add("down", slots, weights[None].numpy(), out.numpy())
    assert torch.allclose(out[0], 1 + weights @ down, atol=max(count, 1) * 1e-5, rtol=1e-5)
    block, heights = torch.randn(3, hidden), torch.randn(count, 3)
    found = torch.empty(count, 3)
    cached.dot_block("up", slots, cached.tokens(block), lambda i, j, z: found[i:j].copy_(z))
    assert torch.allclose(found, up @ block.T, atol=1e-5 * hidden, rtol=1e-5)
    for fires in (heights, heights * (torch.rand(count, 3) < 0.05)):  # all do, few do
        sums = cached.sums(3, hidden)
        cached.add_block("down", slots, fires, sums)
        cached.add_block("down", slots, fires, sums)
        expected = 2 * fires.T @ down
        assert torch.allclose(sums.total(), expected, atol=max(count, 1) * 2e-5, rtol=1e-5)
    if count == 10_000:
        assert count * geometry.row_bytes > SHARED_BYTES_MIN, "no thread took part"


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize(("variant", "dtype"), [("opt", "float32"), ("llama-gqa", "bfloat16")])
def test_a_packed_store(made: Made, number_format: str, variant: str, dtype: str) -> None:
    plain, store = made.store(variant, dtype), made.store(variant, dtype, number_format)
    assert verify_store(store.path).problems == ()
    assert (store.geometry.number_format, store.geometry.dtype) == (number_format, dtype)
    assert store.id != plain.id
    bundles = Bundles(store, 1 << 16, Allowance(0))
    for layer in range(store.geometry.layers):
        blocks = [block.clone() for _, block in bundles.blocks(layer)]
        for index, part in enumerate(store.geometry.parts):
            raw = packed(plain.rows(layer, part), number_format)
            expected = unpacked(raw, number_format, store.geometry.hidden)
            np.testing.assert_array_equal(store.rows(layer, part), expected)
            found = torch.cat([block[index] for block in blocks])
            np.testing.assert_array_equal(found.numpy(), expected)


def test_how_many_bytes_a_bundle_takes() -> None:
    opt = Geometry(32, 16384, 4096, False, "float16")
    assert opt.stride_bytes == 16384
    eight, four = (dataclasses.replace(opt, packed=kind) for kind in PACKED)
    assert (eight.bundle_bytes, eight.stride_bytes) == (8192, 8192)
    assert (four.bundle_bytes, four.stride_bytes) == (5120, 8192)
    llama = dataclasses.replace(four, gated=True)
    assert (llama.bundle_bytes, llama.stride_bytes) == (7680, 8192)


def test_what_packing_lost_is_told(made: Made, tmp_path: Path) -> None:
    src = made.checkpoint("opt", "float32")
    assert convert(src, tmp_path / "float").weight_error is None
    eight, four = (convert(src, tmp_path / kind, bundles=kind) for kind in PACKED)
    for result, least, most in ((eight, 0.003, 0.02), (four, 0.05, 0.1)):
        assert result.weight_error is not None
        assert result.weight_error_worst is not None
        assert least < result.weight_error <= result.weight_error_worst < most


def test_rows_that_cannot_be_packed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Variant("opt", {"hidden_size": 48, "word_embed_proj_dim": 48})
    monkeypatch.setitem(VARIANTS, "narrow", narrow)
    src = make_checkpoint(tmp_path / "src", "narrow")
    with pytest.raises(StoreError, match=r"int4 takes rows of a multiple of 32 numbers.* have 48"):
        plan_conversion(src, tmp_path / "dst", bundles="int4")
    convert(src, tmp_path / "dst", bundles="int8")
    with pytest.raises(SettingError, match=r"INFLASH_RESIDENT: .*int4 takes rows of a multiple"):
        make_plan(Settings(tmp_path / "dst", resident="int4"), Store.open(tmp_path / "dst"))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", "opt")
    tensors = load_file(src / "model.safetensors")
    tensors["model.decoder.layers.1.fc2.weight"][3, 4] = torch.inf
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=r"layers\.1\.fc2\.weight has numbers that are not finite"):
        convert(src, tmp_path / "dst", bundles="int8")


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "int3"), ("scales", None), ("scales", "row-end")]
)
def test_a_format_that_is_not_known_is_refused(
    made: Made, tmp_path: Path, field: str, value: object
) -> None:
    convert(made.checkpoint("opt", "float32"), tmp_path / "store", bundles="int8")
    path = tmp_path / "store" / MANIFEST
    content = json.loads(path.read_bytes())
    content["number_format"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"number format 'int[38]' is not known"):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("resident", PACKED)
@pytest.mark.parametrize("variant", ["opt", "llama-gqa"])
def test_the_plan_has_the_bytes_of_packed_matrices(made: Made, variant: str, resident: str) -> None:
    """Those that compute makes: its matrices, and what stays as it is."""
    store = made.store(variant, "float16")
    plan = make_plan(Settings(store.path, resident=resident, embedding="memory"), store)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(store.config_dir))
    total = 2 * sum(b.size for n in range(store.geometry.layers) for b in store.biases(n).values())
    names = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("fc1", "fc2", "mlp.")):
            continue
        if name not in names:
            total += 2 * tensor.numel()
        else:
            kind = "int8" if name.endswith(("head.weight", "v_proj.weight")) else resident
            total += tensor.shape[0] * row_bytes(kind, tensor.shape[1])
    assert plan.resident_bytes == total
    assert plan.resident_bytes < make_plan(Settings(store.path), store).resident_bytes


@pytest.mark.parametrize("number_format", PACKED)
def test_a_linear_module_over_packed_rows(made: Made, number_format: str) -> None:
    store = made.store("llama-relu", "float16")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor = next(h[name] for p in store.resident_paths() if name in (h := read_header(p)))
    wide = read_float32(tensor)
    expected = unpacked(packed(wide, number_format), number_format, wide.shape[1])
    bias, products = torch.randn(len(wide)), Products(2)
    linear = RowLinear(pack(tensor, number_format, products), bias, products)
    for x in (torch.randn(1, 64), torch.randn(2, 9, 64)):
        wanted = x @ torch.from_numpy(expected).T + bias
        assert torch.allclose(linear(x), wanted, atol=1e-3, rtol=1e-4)


def test_torch_multiplies_the_same_int8_rows(made: Made) -> None:
    store = made.store("llama-relu", "float16")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensor = next(h[name] for p in store.resident_paths() if name in (h := read_header(p)))
    ours, theirs = (RowLinear(pack(tensor, "int8", p), None, p) for p in (Products(1), Products(1)))
    theirs.take_torch()
    x = torch.randn(1, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-3, rtol=1e-4)
    probe = choose_int8(torch.nn.ModuleList([ours]))
    assert probe is not None
    assert min(probe.ours_us, probe.torch_us) > 0
    assert choose_int8(torch.nn.ModuleList([torch.nn.Linear(2, 2)])) is None


def test_modules_of_several_formats_are_multiplied_together() -> None:
    """As few tokens, and as a block: where each would be the one alone, and the other the other."""
    torch.manual_seed(2)
    formats, products = {"q": "int4", "k": "int8", "v": "int4"}, Products(2)
    attention, alone, rows = torch.nn.Module(), {}, {}
    for name, number_format in formats.items():
        raw = packed(torch.randn(96, 512).numpy(), number_format)
        items = raw.reshape(-1).view(BITS[number_format])
        rows[f"{name}.weight"] = Rows(items, np.arange(96, dtype=np.int64) * raw.shape[1])
        setattr(attention, name, torch.nn.Linear(512, 96))
        bias = attention.get_submodule(name).bias
        alone[name] = RowLinear(rows[f"{name}.weight"], bias, products)
    multiply_rows(attention, products, rows, ("k", "q", "v"))
    counts = {few + more for few in FEW.values() for more in (0, 1)}
    with torch.inference_mode():
        for tokens in (1, 2, *sorted(counts)):
            x = torch.randn(1, tokens, 512)
            for name in ("k", "q", "v"):
                found = attention.get_submodule(name)(x)
                assert torch.allclose(found, alone[name](x), atol=0.05)


@pytest.mark.parametrize("width", [CHUNK, 8 * CHUNK, 2 * CHUNK + 16, 48])
@pytest.mark.parametrize("number", [-128, 126])
def test_the_largest_integers_fit(width: int, number: int) -> None:
    """Every product at its largest, of one sign: sums stay below 2^31. The scale is 1."""
    items = np.full(width, number, np.int8)
    items[:SCALED] |= np.array([0x3F80 >> bit & 1 for bit in range(SCALED)], np.int8)
    x = torch.full((width,), -7.0)
    out = Products(1).dot(items, np.zeros(1, np.int64), x).numpy()
    np.testing.assert_allclose(out, items.astype(np.float64).sum() * -7, rtol=1e-5)


@pytest.mark.parametrize("number_format", PACKED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_comes_through(number_format: str, bad: float) -> None:
    rows = rows_like(0, 5, 4, 1.0)
    x = torch.ones(rows.shape[1])
    x[17] = bad
    raw = packed(rows, number_format)
    items = raw.reshape(-1).view(BITS[number_format])
    out = Products(1).dot(items, np.arange(5, dtype=np.int64) * raw.shape[1], x)
    assert not out.isfinite().any()


def test_modules_that_are_multiplied_together_give_what_each_gives_alone() -> None:
    torch.manual_seed(1)
    products = Products(2)
    attention = torch.nn.Module()
    weights = {"q": torch.randn(70, 512), "k": torch.randn(33, 512), "v": torch.randn(3100, 512)}
    for name, weight in weights.items():
        linear = torch.nn.Linear(512, len(weight))
        linear.weight.data = weight
        setattr(attention, name, linear)
    alone = [RowLinear(rows_of(w), attention.get_submodule(n).bias, products)
             for n, w in weights.items()]  # fmt: skip
    multiply_rows(attention, products, {}, ("q", "k", "v", "missing"))
    together = [attention.get_submodule(name) for name in weights]
    assert sum(weight.nbytes for weight in weights.values()) >= SHARED_BYTES_MIN, "shared"
    with torch.inference_mode():
        for rows in (1, 1, 3, 1):
            x, other = torch.randn(1, rows, 512), torch.randn(1, 1, 512)
            for ours, one in zip(together, alone, strict=True):
                assert torch.equal(ours(x), one(x))
            assert torch.equal(together[0](x), alone[0](x))
            assert torch.equal(together[2](other), alone[2](other)), "not the input of the first"
            assert torch.equal(together[1](x), alone[1](x))
