"""transformers' own model, built without its FFN: attention, norms, embeddings, head.

Nothing of the FFN is ever allocated: the class is built on the meta device, each layer's FFN is
replaced, and only then do resident tensors come in. Refuses resident files that do not hold
exactly the tensors that the model needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.errors import StoreError
from common.model.families import Family, family_named
from common.store.store import forget_pages
from common.store.tensors import DTYPES, Tensor, read_exactly, read_header


def library_config(config: Any) -> Any:
    """A copy of `config` that transformers' class takes: it has no fatrelu, so it says relu."""
    config = copy.deepcopy(config)
    family = family_named(config.model_type)
    if getattr(config, family.activation_key) == "fatrelu":
        setattr(config, family.activation_key, "relu")
    return config


def meta_model(config: Any, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The causal model of `config` with its own FFN, no parameter or buffer allocated."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            library_config(config), dtype=dtype, **chosen
        )
    return model.eval().requires_grad_(False)


def build_skeleton(
    config: Any,
    ffn: Callable[[int], nn.Module],
    dtype: torch.dtype,
    attention: str | None = None,
) -> nn.Module:
    """The causal model of `config` with `ffn(layer)` in the place of each layer's FFN.

    Args:
        config: transformers' configuration, as AutoConfig gives it; fatrelu is understood.
        ffn: makes the module that takes a layer's FFN input, [..., hidden], and returns its
            output; activation and biases are its own.
        dtype: of the parameters. They stay on the meta device until `fill`.
        attention: name of an attention function registered with transformers.

    Returns:
        The model in eval mode; its buffers (rotary tables) are real and on the CPU.
    """
    model: Any = meta_model(config, dtype, attention)
    family = family_named(config.model_type)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        replace_ffn(layer, family, ffn(index))
    _rebuild_buffers(model)
    return model


def replace_ffn(layer: nn.Module, family: Family, ffn: nn.Module) -> None:
    """Puts `ffn` in the place of a decoder layer's FFN, and drops what was there."""
    setattr(layer, family.ffn, ffn)
    for name in family.bypassed:
        setattr(layer, name, nn.Identity())


def _rebuild_buffers(model: Any) -> None:
    """The meta device loses tables that no checkpoint holds; their owners compute them anew."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=model.config))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise RuntimeError(f"buffers without values: {', '.join(left)}")


def find_resident(model: Any, paths: Iterable[Path]) -> dict[str, Tensor]:
    """Where a skeleton's parameters lie in safetensors files, by name; the files are not read.

    `StoreError` names tensors that are missing, unexpected or misshapen.
    """
    expected = {name: p for name, p in model.state_dict(keep_vars=True).items() if p.is_meta}
    found: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            _check(path, tensor, None if name in found else expected.get(name))
            found[name] = tensor
    missing = expected.keys() - found.keys() - model.all_tied_weights_keys.keys()
    if missing:
        raise StoreError(f"the store lacks resident tensors: {', '.join(sorted(missing))}")
    return found


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Reads `tensors`, named as `module` names its parameters, and puts them in their places.

    They are read, not mapped: mapped pages would leave memory under pressure, and come back by
    page faults. Those of another floating dtype are converted to the parameter's.
    """
    for name, tensor in tensors.items():
        _put(module, name, _read(tensor).to(module.get_parameter(name).dtype))


def empty(module: nn.Module, names: Iterable[str]) -> None:
    """Puts parameters back on the meta device: their memory is free."""
    for name in names:
        _put(module, name, module.get_parameter(name).to("meta"))


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, nn.Parameter(values, requires_grad=False))


def _check(path: Path, tensor: Tensor, expected: torch.Tensor | None) -> None:
    if expected is None:
        raise StoreError(f"{path}: tensor {tensor.name} is not expected, or is there twice")
    shape = tuple(expected.shape)
    if tensor.shape != shape or tensor.dtype not in DTYPES:
        raise StoreError(
            f"{path}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)},"
            f" expected shape {list(shape)}"
        )


def _read(tensor: Tensor) -> torch.Tensor:
    values = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    if tensor.nbytes:
        raw = values.view(-1).view(torch.uint8).numpy().data
        with tensor.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), raw, tensor.offset, tensor.path)
            forget_pages(file.fileno())
    return values
