"""The tensors that a model of some config.json has: names and shapes, by arithmetic. No torch here.

Names are those of transformers' state dict. Of two tied tensors there is one. The unit test
compares with transformers' own classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import StoreError
from common.model.families import Family
from common.resident import EMBEDDING, HEAD

Shape = tuple[int, ...]

POSITIONS = "embed_positions.weight"
_OPT_POSITIONS = 2  # rows of the positions' embedding that no token has


class Config:
    """config.json, whose missing keys are the family's defaults. Attributes, as `activation_of`
    and `geometry_of` take them; what has no default is a `StoreError` that names it."""

    _DEFAULTS: Mapping[str, Mapping[str, Any]] = {
        "opt": {
            "activation_function": "relu", "enable_bias": True, "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
            "_remove_final_layer_norm": False, "word_embed_proj_dim": None,
        },
        "llama": {
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None,
        },
    }  # fmt: skip

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self._where = values, where
        self._defaults = self._DEFAULTS[values["model_type"]]

    def __getattr__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        if name in self._defaults:
            return self._defaults[name]
        raise StoreError(f"{self._where} has no {name}: it is no whole config.json")

    def count(self, name: str) -> int:
        """A size: a whole number from 1 up."""
        value = getattr(self, name)
        if type(value) is not int or value < 1:
            raise StoreError(f"{self._where}: {name} is {value!r}, which is no size")
        return value

    @property
    def head_width(self) -> int:
        return int(self.head_dim or self.count("hidden_size") // self.count("num_attention_heads"))


def tensor_shapes(family: Family, config: Config) -> dict[str, Shape]:
    """All tensors of the model."""
    around, inside = _FAMILIES[family.name]
    shapes = dict(around(config))
    for layer in range(config.count("num_hidden_layers")):
        for name, shape in inside(config):
            shapes[f"{family.layers}.{layer}.{name}"] = shape
    return shapes


def ffn_weights(family: Family, layers: int) -> set[str]:
    """Names of what lies on flash."""
    return {family.tensor(layer, part) for layer in range(layers) for part in family.weights}


def multiplied_bytes(sizes: Mapping[str, int]) -> int:
    """Of resident tensors, by name and bytes: what every token multiplies. Of an embedding a token
    takes one row, unless it is the head as well."""
    tied = HEAD not in sizes
    skipped = (POSITIONS,) if tied else (POSITIONS, EMBEDDING)
    return sum(size for name, size in sizes.items() if not name.endswith(skipped))


def items(shape: Shape) -> int:
    return math.prod(shape)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _opt_norm(name: str, config: Config) -> Iterator[tuple[str, Shape]]:
    if config.layer_norm_elementwise_affine:
        yield f"{name}.weight", (config.count("hidden_size"),)
        yield f"{name}.bias", (config.count("hidden_size"),)


def _opt_around(config: Config) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = config.count("hidden_size"), config.count("vocab_size")
    width = config.word_embed_proj_dim or hidden
    yield "model.decoder.embed_tokens.weight", (vocabulary, width)
    positions = config.count("max_position_embeddings") + _OPT_POSITIONS
    yield "model.decoder.embed_positions.weight", (positions, hidden)
    if width != hidden:
        yield "model.decoder.project_in.weight", (hidden, width)
        yield "model.decoder.project_out.weight", (width, hidden)
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        yield from _opt_norm("model.decoder.final_layer_norm", config)
    if not config.tie_word_embeddings:
        yield HEAD, (vocabulary, width)


def _opt_inside(config: Config) -> Iterator[tuple[str, Shape]]:
    hidden, width, bias = config.count("hidden_size"), config.count("ffn_dim"), config.enable_bias
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(f"self_attn.{name}", hidden, hidden, bias)
    yield from _opt_norm("self_attn_layer_norm", config)
    yield from _linear("fc1", width, hidden, bias)
    yield from _linear("fc2", hidden, width, bias)
    yield from _opt_norm("final_layer_norm", config)


def _llama_around(config: Config) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = config.count("hidden_size"), config.count("vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield HEAD, (vocabulary, hidden)


def _llama_inside(config: Config) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    queries = heads * config.head_width
    keys = (config.num_key_value_heads or heads) * config.head_width
    bias, width = config.attention_bias, config.count("intermediate_size")
    yield from _linear("self_attn.q_proj", queries, hidden, bias)
    yield from _linear("self_attn.k_proj", keys, hidden, bias)
    yield from _linear("self_attn.v_proj", keys, hidden, bias)
    yield from _linear("self_attn.o_proj", hidden, queries, bias)
    yield from _linear("mlp.gate_proj", width, hidden, config.mlp_bias)
    yield from _linear("mlp.up_proj", width, hidden, config.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, width, config.mlp_bias)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


_FAMILIES = {"opt": (_opt_around, _opt_inside), "llama": (_llama_around, _llama_inside)}
