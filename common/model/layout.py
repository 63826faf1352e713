"""Which tensor of a checkpoint goes where in a store, and how many bytes that makes.

Pure but for the headers it is given. Checks every tensor against transformers' own class, built
without memory: refuses what is missing, misshapen, of an unsupported dtype, or at odds with the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import StoreError
from common.model.activation import Activation
from common.model.bundling import reordered
from common.model.checkpoint import Checkpoint
from common.model.families import TRANSPOSED, Family, activation_of, family_named, geometry_of
from common.model.skeleton import meta_model
from common.store.geometry import DTYPE_BYTES, Geometry
from common.store.manifest import BIASES, resident_file
from common.store.store import bias_name, read_order
from common.store.tensors import Tensor, make_header

Shapes = Mapping[str, tuple[int, ...]]
_NAMED_MAX = 4  # tensors named in one error
_COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """A conversion, decided: the source of every byte of the store but the configuration."""

    family: Family
    activation: Activation
    geometry: Geometry
    weights: tuple[Mapping[str, Tensor], ...]  # per layer: part -> weight
    safetensors: Mapping[str, Mapping[str, Tensor]]  # file of the store -> name -> tensor
    unused: tuple[str, ...]  # tensors of the checkpoint that the model has no place for

    @property
    def resident_bytes(self) -> int:
        """Bytes of the safetensors files: all that stays in memory."""
        return sum(safetensors_bytes(tensors) for tensors in self.safetensors.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the store but for its configuration and manifest."""
        checksums = 8 * self.geometry.neurons * self.geometry.layers
        return self.geometry.ffn_bytes + checksums + self.resident_bytes


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    return len(header_of(tensors)) + sum(t.nbytes for t in tensors.values())


def header_of(tensors: Mapping[str, Tensor]) -> bytes:
    return make_header((name, t.dtype, t.shape) for name, t in tensors.items())


def placed_biases(
    named: Mapping[str, Tensor], geometry: Geometry, folder: Path
) -> dict[str, Tensor]:
    """The biases file's tensors, those of neurons in the orders of the (partial) store `folder`."""
    placed = dict(named)
    for layer in range(geometry.layers):
        order = read_order(folder, layer, geometry)
        for part in geometry.parts:
            name = bias_name(layer, part)
            if part != TRANSPOSED and name in placed:
                placed[name] = reordered(placed[name], order)
    return placed


def make_layout(checkpoint: Checkpoint) -> Layout:
    """Decides the conversion of `checkpoint`; `StoreError` names what stands against it."""
    family = family_named(checkpoint.config.model_type)
    activation = activation_of(family, checkpoint.config)
    try:
        model: Any = meta_model(checkpoint.config, torch.float32)
    except Exception as error:  # a configuration that the class itself refuses
        where = checkpoint.folder / "config.json"
        raise StoreError(f"{where} is refused by transformers: {error}") from None
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found, unused = _match(checkpoint.tensors, shapes)
    for target, source in model.all_tied_weights_keys.items():
        _untie(found, target, source)
        del shapes[target]
    _check(found, shapes)
    dtype = _ffn_dtype(family, checkpoint.config.num_hidden_layers, found)
    geometry = geometry_of(family, checkpoint.config, dtype)
    weights = tuple(
        {part: found.pop(family.tensor(layer, part)) for part in geometry.parts}
        for layer in range(geometry.layers)
    )
    _check_parts(weights, geometry)
    files = {BIASES: _take_biases(family, geometry, found)} | _residents(family, geometry, found)
    return Layout(family, activation, geometry, weights, files, unused)


def _match(tensors: Mapping[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], Any]:
    """Tensors by transformers' names: old checkpoints leave out, or add, the leading "model."."""
    found, unused = {}, []
    for name, tensor in tensors.items():
        options = (name, f"model.{name}", name.removeprefix("model."))
        known = next((option for option in options if option in shapes), None)
        if known is None:
            unused.append(name)
        else:
            found[known] = tensor
    return dict(sorted(found.items())), tuple(unused)


def _untie(found: dict[str, Tensor], target: str, source: str) -> None:
    """Leaves one of two tied tensors, under the source's name."""
    tied = found.pop(target, None)
    if tied is None:
        return
    if source not in found:
        found[source] = tied
    elif not _same(tied, found[source]):
        raise StoreError(
            f"config.json ties {target} to {source}, but they differ: say"
            ' "tie_word_embeddings": false in it if both are meant'
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.path, one.offset) == (other.path, other.offset):
        return True
    for start in range(0, one.nbytes, _COMPARE_BYTES):
        size = min(_COMPARE_BYTES, one.nbytes - start)
        pair = bytearray(size), bytearray(size)
        one.read_into(memoryview(pair[0]), start)
        other.read_into(memoryview(pair[1]), start)
        if pair[0] != pair[1]:
            return False
    return True


def _check(found: Mapping[str, Tensor], shapes: Shapes) -> None:
    missing = [f"{n} (shape {list(s)})" for n, s in shapes.items() if n not in found]
    if missing:
        raise StoreError(f"the checkpoint lacks {len(missing)} tensors: {_some(missing)}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise StoreError(
                f"tensor {name} has shape {list(found[name].shape)}, expected {list(shape)}"
            )
        if found[name].dtype not in DTYPE_BYTES:
            raise StoreError(
                f"tensor {name} is {found[name].dtype}; supported are {', '.join(DTYPE_BYTES)}"
            )


def _ffn_dtype(family: Family, layers: int, found: Mapping[str, Tensor]) -> str:
    """The one dtype of all FFN weights: a bundle has one number format."""
    by_dtype: dict[str, list[str]] = {}
    for layer in range(layers):
        for part in family.weights:
            name = family.tensor(layer, part)
            by_dtype.setdefault(found[name].dtype, []).append(name)
    if len(by_dtype) != 1:
        kinds = "; ".join(f"{dtype}: {_some(names)}" for dtype, names in by_dtype.items())
        raise StoreError(f"the FFN's tensors must be of one dtype, but are of several: {kinds}")
    return next(iter(by_dtype))


def _check_parts(weights: tuple[Mapping[str, Tensor], ...], geometry: Geometry) -> None:
    """What the class expects and what the table says must be the same shape."""
    for parts in weights:
        for part, tensor in parts.items():
            shape = (geometry.neurons, geometry.hidden)
            if tensor.shape != (shape[::-1] if part == TRANSPOSED else shape):
                raise StoreError(f"tensor {tensor.name} has shape {tensor.shape}, not of a bundle")


def _take_biases(family: Family, geometry: Geometry, found: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [(layer, part) for layer in range(geometry.layers) for part in geometry.parts]
    pairs = [(bias_name(*n), found.pop(family.tensor(*n, "bias"), None)) for n in names]
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _residents(
    family: Family, geometry: Geometry, found: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {resident_file(None): {}}
    files |= {resident_file(layer): {} for layer in range(geometry.layers)}
    for name, tensor in found.items():
        layer, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
        in_layer = rest and name.startswith(f"{family.layers}.") and layer.isdecimal()
        files[resident_file(int(layer) if in_layer else None)][name] = tensor
    return files


def _some(names: list[str]) -> str:
    left = len(names) - _NAMED_MAX
    return ", ".join(names[:_NAMED_MAX]) + (f" and {left} more" if left > 0 else "")
