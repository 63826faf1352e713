"""Planted checkpoints: the same bytes again, whole or not there, and they behave as planted.

Small shapes: their statistics are coarse, so the bounds are; the published figures themselves are
checked by `inflash bench` on the shapes that it is asked for.
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import lowrank
from common.errors import StoreError, UserError
from common.model.convert import convert
from common.planted import recency
from common.planted.check import measure
from common.planted.checkpoint import FACTORS, FACTS, Planted, make_checkpoint, tensor_shapes
from common.planted.families import QUIET, plant_of
from common.planted.layer import LENGTHS, SETTLED, fire_rate
from common.planted.noise import noise_blocks
from common.planted.predictors import plant_predictors
from common.planted.shapes import SHAPES, config_of
from common.planted.shards import Shards, split
from common.store.store import Store

CONTEXT = 200
_SMALL = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 600,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "ffn_dim": 1024, "word_embed_proj_dim": 256} | _SMALL,
    "llama": {
        "model_type": "llama", "intermediate_size": 704, "hidden_act": "relu",
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    } | _SMALL,
}  # fmt: skip

TINY = CONFIGS["opt"] | {
    "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
}  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(write_config(folder / "shape", CONFIGS[request.param]))
    return make_checkpoint(config, folder / "checkpoint", seed=3)


@pytest.fixture(scope="module")
def store(planted: Planted) -> Store:
    path = planted.folder.with_name("store")
    convert(planted.folder, path)
    store = Store.open(path)
    plant_predictors(planted.folder, store)
    return store


def test_the_plant_shows_on_tokens_that_calibration_did_not_see(store: Store) -> None:
    rows = {row.what: row for row in measure(store, tokens=CONTEXT)}

    def measured(what: str) -> float:
        return rows[what].measured

    assert measured("neurons that fire") == pytest.approx(0.033, rel=0.15)
    assert measured("fire in the first layer") == pytest.approx(0.016, rel=0.3)
    assert measured("fire in the last layer") == pytest.approx(0.054, rel=0.2)
    assert measured("named") == pytest.approx(0.10, rel=0.2)
    assert measured("false negatives") == pytest.approx(0.05, abs=0.02)
    assert measured("false positives") == pytest.approx(0.07, rel=0.2)
    assert measured("false negatives by look-ahead") == pytest.approx(0.03, abs=0.02)
    assert measured("named by look-ahead") < 0.18
    assert measured("named in 5 tokens") == pytest.approx(0.24, rel=0.2)
    assert measured("cached by a window of 4 tokens") == pytest.approx(0.24, rel=0.2)
    assert measured("new per token in it") == pytest.approx(0.024, rel=0.3)
    decay, optimum, window = (
        measured(f"misses per named neuron, 24% cached, {policy}")
        for policy in ("decay", "optimum", "window as large as fits")
    )
    assert optimum < decay < 1.05 * window


def test_measured_tokens_are_other_ones_with_another_seed(store: Store) -> None:
    one, other = (measure(store, seed, tokens=100)[0].measured for seed in (1, 2))
    assert one != other


def test_heads_look_back_by_distance_alone(planted: Planted) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        planted.folder, dtype=torch.float32, attn_implementation="eager"
    )
    plant = plant_of(model.config)
    ids = torch.randint(600, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = model(ids, output_attentions=True, output_hidden_states=True)
    group = plant.widths.heads // plant.widths.kv_heads
    for layer in (0, plant.widths.layers - 1):
        loudness = plant.loudness(plant.norm(seen.hidden_states[layer][0]))
        loudness /= loudness[SETTLED:].mean()
        for head in range(plant.widths.heads):
            length = LENGTHS[head // group % len(LENGTHS)]
            wanted = recency.weights(plant.frequencies, length, loudness)
            off = (seen.attentions[layer][0, head] - wanted).abs().sum(1)
            assert float(off.mean()) < (0.3 if layer == 0 else 0.4), (layer, head)


def test_a_head_of_the_other_length_is_told_from_it() -> None:
    frequencies = plant_of(config_of("opt-125m")).frequencies
    short, long = (recency.weights(frequencies, n, torch.ones(120))[-1] for n in LENGTHS)
    assert float((short - long).abs().sum()) > 0.7


@pytest.mark.parametrize("shape", ["opt-6.7b", "llama-7b-relu"])
@pytest.mark.parametrize("length", LENGTHS)
def test_weights_fall_with_distance(shape: str, length: float) -> None:
    frequencies = plant_of(config_of(shape)).frequencies
    latest = recency.weights(frequencies, length, torch.ones(2048))[-1].flip(0)
    distance = torch.arange(len(latest))
    assert float(latest[:100] @ distance[:100].float()) == pytest.approx(length, rel=0.25)
    assert float(latest[int(8 * length) :].sum()) < 0.05
    assert float(latest[1000:].max()) < 1e-4


def test_rates_are_the_published_ones() -> None:
    rates = [fire_rate(layer, 32) for layer in range(32)]
    assert (rates[0], rates[-1]) == (0.016, 0.054)
    assert rates[16] == pytest.approx(0.027, abs=0.0015)
    assert np.mean(rates) == pytest.approx(0.033, abs=0.0005)


def test_same_seed_same_bytes(tmp_path: Path, planted: Planted) -> None:
    config = config_of(planted.folder / "config.json")
    again = make_checkpoint(config, tmp_path / "again", seed=3).folder
    names = sorted(path.name for path in planted.folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert filecmp.cmpfiles(planted.folder, again, names, shallow=False) == (names, [], [])


def test_another_seed_other_bytes(tmp_path: Path) -> None:
    config = config_of(write_config(tmp_path, TINY))
    one, other = (make_checkpoint(config, tmp_path / str(n), seed=n).folder for n in (0, 1))
    weights = [path.name for path in one.iterdir() if path.suffix == ".safetensors"]
    assert len(weights) == 2
    assert filecmp.cmpfiles(one, other, weights, shallow=False)[1] == weights


def test_nothing_is_made_of_zeros(planted: Planted) -> None:
    """A drive may compress them. Norms, biases and positions are small, and stay in memory."""
    model = AutoModelForCausalLM.from_pretrained(planted.folder, dtype=torch.float32)
    for name, values in model.state_dict().items():
        if values.dim() == 2 and "positions" not in name:
            assert float((values == 0).float().mean()) < 0.01, name


def test_it_is_whole_or_not_there(tmp_path: Path) -> None:
    config = config_of(write_config(tmp_path, TINY))

    class Stops:
        def __init__(self, after: int):
            self.left = after

        def start(self, total_bytes: int, done_bytes: int) -> None:
            assert (total_bytes, done_bytes) == (total, 0)

        def advance(self, written_bytes: int) -> None:
            self.left -= written_bytes
            if self.left < 0:
                raise KeyboardInterrupt

        def note(self, sentence: str) -> None: ...

    total = sum(2 * int(np.prod(s)) for _, s in tensor_shapes(config, plant_of(config)))
    folder = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(config, folder, 0, Stops(total // 2))
    assert not folder.exists()
    whole = Stops(total)
    make_checkpoint(config, folder, 0, whole)
    assert whole.left == 0, "every byte was told"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made"]
    with pytest.raises(StoreError, match="exists already"):
        make_checkpoint(config, folder, 0)


def test_predictors_are_those_of_a_fit(planted: Planted, store: Store) -> None:
    factors = lowrank.read_predictors(store)
    report = json.loads((store.path / lowrank.REPORT).read_bytes())
    assert lowrank.predictor_problem(store) == ""
    assert len(factors["same"]) == len(factors["ahead"]) == store.geometry.layers
    shares = lowrank.named_shares(store)
    assert shares is not None
    assert np.mean(shares) == pytest.approx(0.10, rel=0.2)
    assert shares[0] < shares[-1]
    assert report["totals"]["same"]["recall"] == pytest.approx(0.95, abs=0.005)
    assert report["planted"] == planted.facts["targets"]


def test_predictors_follow_the_order_of_the_neurons(planted: Planted, store: Store) -> None:
    before = lowrank.read_predictors(store)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(store.geometry.neurons) for _ in range(store.geometry.layers)]
    plant_predictors(planted.folder, store, orders)
    after = lowrank.read_predictors(store)
    plant_predictors(planted.folder, store)
    kinds: tuple[lowrank.Kind, ...] = ("same", "ahead")
    for kind in kinds:
        for layer, order in enumerate(orders):
            old, new = before[kind][layer], after[kind][layer]
            features = rng.standard_normal((3, old.a.values.shape[1])).astype(np.float32)
            # Rounded to float16 after a sum over the neurons, in their order.
            assert np.allclose(new.scores(features), old.scores(features)[:, order], atol=0.02)


def test_predictors_of_another_checkpoint_are_refused(tmp_path: Path, store: Store) -> None:
    config = config_of(write_config(tmp_path, TINY | {"num_hidden_layers": 4}))
    other = make_checkpoint(config, tmp_path / "other", seed=0).folder
    with pytest.raises(UserError, match="name the checkpoint"):
        plant_predictors(other, store)
    with pytest.raises(UserError, match="no planted checkpoint"):
        plant_predictors(store.path, store)
    facts = json.loads((other / FACTS).read_bytes())
    (other / FACTS).write_text(json.dumps(facts | {"version": 0}))
    with pytest.raises(UserError, match="version 0"):
        Planted.open(other)
    assert (other / FACTORS).exists()


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("opt-125m", 125e6), ("opt-1.3b", 1.316e9), ("opt-2.7b", 2.65e9), ("opt-6.7b", 6.66e9),
     ("llama-7b-relu", 6.74e9)],
)  # fmt: skip
def test_shapes_have_the_published_sizes(shape: str, parameters: float) -> None:
    config = config_of(shape)
    shapes = tensor_shapes(config, plant_of(config))
    assert sum(int(np.prod(s)) for _, s in shapes) == pytest.approx(parameters, rel=0.005)
    assert config.dtype == torch.float16
    assert shape in SHAPES


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("opt", {"activation_function": "gelu"}, "the plant needs 'relu'"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt", {"word_embed_proj_dim": 64}, "word_embed_proj_dim"),
        ("opt", {"model_type": "gpt2"}, "'gpt2' cannot be planted"),
        ("llama", {"hidden_act": "silu"}, "the plant needs 'relu'"),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "2 heads"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
    ],
)  # fmt: skip
def test_what_cannot_be_planted_is_refused(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(write_config(tmp_path, CONFIGS[family] | change))


def test_a_shape_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shape 'opt-6\.8b'.*opt-6\.7b"):
        config_of("opt-6.8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="refused by transformers"):
        config_of(tmp_path / "config.json")


def test_noise_has_variance_one_and_repeats_nothing() -> None:
    blocks = [block.clone() for _, block in noise_blocks(0, "a", 1000, 501)]
    values = torch.cat(blocks)
    assert values.shape == (1000, 501)
    assert float(values.mean()) == pytest.approx(0, abs=0.005)
    assert float(values.square().mean()) == pytest.approx(1, rel=0.005)
    other = next(noise_blocks(0, "b", 1000, 501))[1]
    for mine, its in ((values[:500], values[500:]), (values, other)):
        assert abs(float((mine * its).mean())) < 0.01
    assert 0 < QUIET < 0.1


def test_shards_take_tensors_in_their_order(tmp_path: Path) -> None:
    shapes = [("a", (2, 3)), ("b", (4,))]
    shards = Shards(tmp_path, shapes, lambda count: None)
    shards.write("a", torch.ones(1, 3))
    with pytest.raises(ValueError, match="of a come next"):
        shards.write("b", torch.ones(4))
    with pytest.raises(ValueError, match="was not written whole"):
        shards.close()
    shards.abandon()
    large = [(str(n), (1 << 28,)) for n in range(5)]  # half a GiB each
    assert [len(shard) for shard in split(large)] == [2, 2, 1]
