"""The family tables against transformers' own classes, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import StoreError
from common.model.activation import Activation
from common.model.families import FAMILIES, LLAMA, OPT, activation_of, family_named
from common.model.skeleton import meta_model
from tests.checkpoints import VARIANTS, make_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_the_class_own_tensors(variant: str) -> None:
    config = make_config(VARIANTS[variant])
    family = family_named(config.model_type)
    model = meta_model(config, torch.float32)
    names = model.state_dict().keys()
    for layer in range(config.num_hidden_layers):
        for part in family.weights:
            assert family.tensor(layer, part) in names
    layers = model.get_submodule(family.layers)
    assert all(hasattr(layers[0], name) for name in (family.ffn, *family.bypassed))


@pytest.mark.parametrize("model_type", ["mistral", "gpt2", None, ["opt"], ""])
def test_unknown_family_is_refused_by_name(model_type: object) -> None:
    with pytest.raises(
        StoreError, match=r"model_type .* is not supported; inflash runs opt, llama"
    ):
        family_named(model_type)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "tanh", "leaky_relu", "swish", ""])
def test_activation_that_is_never_zero_is_refused_with_what_works(name: str) -> None:
    with pytest.raises(StoreError, match=r"every neuron would be read.*relu, relu2 and fatrelu"):
        activation_of(LLAMA, SimpleNamespace(hidden_act=name))
    with pytest.raises(StoreError, match=r"activation_function is .*relu, relu2 work"):
        activation_of(OPT, SimpleNamespace(activation_function=name))


def test_activations_that_work() -> None:
    assert activation_of(OPT, SimpleNamespace(activation_function="relu")) == Activation("relu")
    assert activation_of(LLAMA, SimpleNamespace(hidden_act="relu2")) == Activation("relu2")
    fat = SimpleNamespace(hidden_act="fatrelu", hidden_act_param=0.01)
    assert activation_of(LLAMA, fat) == Activation("fatrelu", 0.01)


@pytest.mark.parametrize("threshold", [None, "0.1", -1.0, float("nan")])
def test_fatrelu_without_a_threshold_is_refused(threshold: object) -> None:
    config = SimpleNamespace(hidden_act="fatrelu", hidden_act_param=threshold)
    with pytest.raises(StoreError, match="hidden_act_param"):
        activation_of(LLAMA, config)


@pytest.mark.parametrize(("name", "threshold"), [("silu", 0.0), ("relu", 0.1), ("fatrelu", -0.1)])
def test_impossible_activations(name: str, threshold: float) -> None:
    with pytest.raises(ValueError, match=name):
        Activation(name, threshold)


def test_names_are_the_tables_keys() -> None:
    assert all(family.name == name for name, family in FAMILIES.items())
