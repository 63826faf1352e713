"""The reference: transformers' own model with its own FFN, from the original checkpoint.

What inflash computes is compared with this. Needs memory for the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import StoreError
from common.model.families import TRANSPOSED, activation_of, family_named
from common.model.skeleton import library_config
from common.packed import packed, unpacked
from common.resident import packed_as
from common.store.store import Store


class FATReLU(nn.Module):
    """x where x > threshold, else 0: transformers has no such activation."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.threshold(x, self.threshold, 0.0)


def load_reference(src: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' causal model of the checkpoint in `src`, in `dtype`, eval mode, on the CPU.

    `StoreError` for a folder without config.json, an unknown family or activation.
    """
    if not (src / "config.json").is_file():
        raise StoreError(f"{src} is no checkpoint: it has no config.json")
    config = AutoConfig.from_pretrained(src)
    family = family_named(config.model_type)
    activation = activation_of(family, config)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            src, config=library_config(config), dtype=dtype
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"the checkpoint in {src} cannot be loaded: {reason}") from None
    if activation.name == "fatrelu":
        for layer in model.get_submodule(family.layers):
            layer.get_submodule(family.ffn).act_fn = FATReLU(activation.threshold)
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def pack_like(model: Any, store: Store, resident: str) -> None:
    """Gives the reference `model` the weights that a server of `store` computes with: what packed
    bundles stand for, and what matrices packed as the setting `resident` says do."""
    family, geometry = family_named(model.config.model_type), store.geometry
    bundled = set()
    for layer in range(geometry.layers):
        for part in geometry.parts:
            bundled.add(family.tensor(layer, part))
            if geometry.packed:
                rows, order = torch.from_numpy(store.rows(layer, part)), store.order(layer)
                if order is not None:
                    rows = torch.empty_like(rows).index_copy_(0, torch.tensor(order).long(), rows)
                weight = model.get_parameter(family.tensor(layer, part))
                weight.copy_(rows.T if part == TRANSPOSED else rows)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight" in bundled:
            continue
        shape = tuple(module.weight.shape)
        if number_format := packed_as(f"{name}.weight", shape, resident):
            raw = packed(module.weight.float().numpy(), number_format)
            stands_for = torch.from_numpy(unpacked(raw, number_format, shape[1]))
            # Not copied into it: a tied head's weight is the embedding's, too.
            module.weight = nn.Parameter(stands_for, requires_grad=False)
