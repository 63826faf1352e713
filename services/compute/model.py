"""The model: transformers' class for the family, FlashFFN in every layer, attention and KV ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig

from common.model.families import family_named
from common.model.skeleton import build_skeleton, load_resident
from common.store.store import Store
from services.compute.attention import ATTENTION, attend
from services.compute.ffn import FlashFFN
from services.compute.laps import ProductTime
from services.compute.linear import RowLinear, multiply_rows
from services.compute.pipeline import Pipeline
from services.compute.products import Products


def load_model(store: Store, pipeline: Pipeline, products: Products) -> Any:
    """The store's model with its resident weights; FFN weights are never allocated."""

    def flash_ffn(layer: int) -> FlashFFN:
        biases = {name: torch.from_numpy(b) for name, b in store.biases(layer).items()}
        return FlashFFN(layer, store.geometry, store.activation, biases, pipeline)

    config = AutoConfig.from_pretrained(store.config_dir)
    dtype = getattr(torch, store.geometry.compute_dtype)
    model: nn.Module = build_skeleton(config, flash_ffn, dtype, attention=ATTENTION)
    load_resident(model, store.resident_paths())
    multiply_rows(model, products)
    time_products(model, products, pipeline.laps.product_time)

    def tell(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        pipeline.embedded(hidden.reshape(-1, hidden.shape[-1]))

    layers = model.get_submodule(family_named(config.model_type).layers)
    layers.get_submodule("0").register_forward_pre_hook(tell, with_kwargs=True)
    return model


def time_products(model: nn.Module, products: Products, time: ProductTime) -> None:
    """Has the products of attention and head counted: the rest of their time is Python's."""
    for module in model.modules():
        if isinstance(module, RowLinear):
            setattr(module, "forward", time.timed(module.forward))  # noqa: B010
    shared = functools.partial(attend, share=products.share)
    AttentionInterface.register(ATTENTION, time.timed(shared))
