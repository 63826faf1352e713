"""The model: transformers' class for the family, FlashFFN in every layer, attention and KV ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig

from common.model.families import family_named
from common.model.skeleton import build_skeleton, fill, find_resident
from common.resident import embedding_of, packed_as
from common.store.store import Store
from services.compute.attention import ATTENTION, attend
from services.compute.embedding import FlashEmbedding
from services.compute.ffn import FlashFFN
from services.compute.laps import ProductTime
from services.compute.linear import RowLinear, Rows, multiply_rows, pack
from services.compute.pipeline import Pipeline
from services.compute.products import Products


def load_model(
    store: Store, pipeline: Pipeline, products: Products, resident: str, embedding: str
) -> Any:
    """The store's model with its resident weights, as the setting `resident` has them and the
    plan's `embedding` says; FFN weights are never allocated."""

    def flash_ffn(layer: int) -> FlashFFN:
        return FlashFFN(layer, store.geometry, store.activation, store.biases(layer), pipeline)

    config = AutoConfig.from_pretrained(store.config_dir)
    dtype = getattr(torch, store.geometry.compute_dtype)
    model: nn.Module = build_skeleton(config, flash_ffn, dtype, attention=ATTENTION)
    family = family_named(config.model_type)
    packed = load_resident_as(resident, embedding, model, store, products)
    multiply_rows(model, products, packed, family.together)
    time_products(model, products, pipeline.laps.product_time)

    def tell(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        pipeline.embedded(hidden.reshape(-1, hidden.shape[-1]))

    layers = model.get_submodule(family.layers)
    layers.get_submodule("0").register_forward_pre_hook(tell, with_kwargs=True)
    return model


def load_resident_as(
    resident: str, embedding: str, model: Any, store: Store, products: Products
) -> dict[str, Rows]:
    """Fills the model but for an embedding that stays on flash, and for the matrices that are
    packed; those it returns, by name."""
    tensors = find_resident(model, store.resident_paths())
    weights = dict(tensors)
    if resident != "float":
        weights |= {head: tensors[source] for head, source in model.all_tied_weights_keys.items()}
    formats = {name: packed_as(name, t.shape, resident) for name, t in weights.items()}
    if embedding == "flash":
        name = embedding_of(tensors)
        rows = FlashEmbedding(tensors.pop(name), model.dtype)
        model.set_submodule(name.removesuffix(".weight"), rows)
    fill(model, {name: tensor for name, tensor in tensors.items() if not formats[name]})
    if resident == "float":
        model.tie_weights()
    return {name: pack(weights[name], f, products) for name, f in formats.items() if f}


def time_products(model: nn.Module, products: Products, time: ProductTime) -> None:
    """Has the products of attention and head counted: the rest of their time is Python's."""
    for module in model.modules():
        if isinstance(module, RowLinear):
            setattr(module, "forward", time.timed(module.forward))  # noqa: B010
    shared = functools.partial(attend, share=products.share, do=products.do)
    AttentionInterface.register(ATTENTION, time.timed(shared))
