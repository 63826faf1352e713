"""The model families that inflash runs: one small table each. No torch here.

A table says where the FFN sits in transformers' class, which tensors make a bundle, and which keys
of config.json say its width and activation. Refuses families without a table and activations that
are never zero: with those every neuron would be read for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import StoreError
from common.model.activation import Activation
from common.store.geometry import Geometry

TRANSPOSED = "down"
"""The part that every family here stores as [hidden, neurons]: a neuron's weights are a column."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps its FFN. `name` is transformers' model_type."""

    name: str
    layers: str  # path of the decoder layers in the causal model
    ffn: str  # attribute of a layer that our FFN takes the place of
    bypassed: tuple[str, ...]  # attributes of a layer that become the identity
    together: tuple[str, ...]  # linear modules that are given the same input one after another
    weights: Mapping[str, str]  # part of a bundle -> its linear module, within a layer
    neurons_key: str
    activation_key: str
    threshold_key: str | None  # of a relu with a threshold, where the family has checkpoints of it

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    def tensor(self, layer: int, part: str, kind: str = "weight") -> str:
        """State-dict name of a part's weight, or of its bias."""
        return f"{self.layers}.{layer}.{self.weights[part]}.{kind}"


OPT = Family(
    name="opt",
    layers="model.decoder.layers",
    ffn="fc1",
    bypassed=("activation_fn", "fc2"),
    together=("q_proj", "k_proj", "v_proj"),
    weights={"up": "fc1", "down": "fc2"},
    neurons_key="ffn_dim",
    activation_key="activation_function",
    threshold_key=None,
)

LLAMA = Family(
    name="llama",
    layers="model.layers",
    ffn="mlp",
    bypassed=(),
    together=("q_proj", "k_proj", "v_proj"),
    weights={"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    neurons_key="intermediate_size",
    activation_key="hidden_act",
    threshold_key="hidden_act_param",  # as MiniCPM-S and ProSparse write it
)

FAMILIES = {family.name: family for family in (OPT, LLAMA)}


def family_named(model_type: object) -> Family:
    """The family of a config.json's model_type; `StoreError` names those that there are."""
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise StoreError(
            f"model_type {model_type!r} is not supported; inflash runs {', '.join(FAMILIES)}"
        )
    return family


def activation_of(family: Family, config: Any) -> Activation:
    """The activation in `config` (transformers' object); `StoreError` if it is never zero."""
    name = getattr(config, family.activation_key)
    if name in ("relu", "relu2"):
        return Activation(name)
    if name == "fatrelu" and family.threshold_key:
        return _fatrelu(family.threshold_key, config)
    works = "relu, relu2" + (" and fatrelu" if family.threshold_key else "")
    raise StoreError(
        f"{family.activation_key} is {name!r}: it is not known to be zero for any neuron, so every"
        f" neuron would be read for every token. {works} work: look for a relufied version of the"
        " model"
    )


def _fatrelu(key: str, config: Any) -> Activation:
    threshold = getattr(config, key, None)
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise StoreError(f"the activation is fatrelu, but {key}, its threshold, is {threshold!r}")
    return Activation("fatrelu", float(threshold))


def geometry_of(family: Family, config: Any, dtype: str) -> Geometry:
    """The bundles' shape for a model of `config` (transformers' object)."""
    return Geometry(
        layers=config.num_hidden_layers,
        neurons=getattr(config, family.neurons_key),
        hidden=config.hidden_size,
        gated=family.gated,
        dtype=dtype,
    )
