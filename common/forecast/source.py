"""Whatever names a model (a store, a checkpoint's folder, a config.json, a Hub id), described:
shapes, sizes and number format, of configuration and headers alone. No weight is read. No torch.

Refuses what a conversion would refuse as far as that can be told: another family, an activation
that is never zero, tensors that are missing or misshapen, weights that are quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import StoreError, UserError
from common.forecast import hub
from common.forecast.shapes import (
    Config,
    ffn_weights,
    items,
    multiplied_bytes,
    tensor_shapes,
)
from common.json_object import read_object
from common.model.activation import Activation
from common.model.families import activation_of, family_named, geometry_of
from common.resident import HEAD, embedding_of, spare_embedding_bytes
from common.store.geometry import DTYPE_BYTES, Geometry
from common.store.manifest import MANIFEST
from common.store.store import Store
from common.store.tensors import Tensor, parse_header, read_header

Kind = Literal["store", "checkpoint", "config.json", "Hub"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
INDEX_BYTES_MAX = 32 << 20
CONFIG_BYTES_MAX = 1 << 20
SHARDS_MAX = 512
_CHECKSUM_BYTES = 8  # of a neuron, in a store
_CONFIG_ROOM = 32 << 20  # for configuration, tokenizer and manifest, as a conversion asks for


@dataclass(frozen=True)
class Described:
    """A model, as far as it is known before it is run. Sizes in bytes."""

    name: str
    kind: Kind
    config: Mapping[str, Any]
    family: str
    activation: Activation
    geometry: Geometry
    resident_bytes: int  # in the checkpoint's number format
    multiplied_bytes: int  # of those, what every token multiplies
    embedding_bytes: int  # of those, what can stay on flash
    tokenizer_bytes: int
    store: Store | None
    notes: tuple[str, ...]  # what was taken for granted

    @property
    def store_bytes(self) -> int:
        """What a conversion writes."""
        neurons = self.geometry.layers * self.geometry.neurons
        return (
            self.geometry.ffn_bytes + _CHECKSUM_BYTES * neurons + self.resident_bytes + _CONFIG_ROOM
        )

    @property
    def checkpoint_bytes(self) -> int:
        """The weights as they are downloaded."""
        neurons = self.geometry.layers * self.geometry.neurons
        return neurons * self.geometry.bundle_bytes + self.resident_bytes


def describe(model: str) -> Described:
    """What `model` names; `UserError` says why nothing can be foretold of it."""
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file():
        return _of_store(Store.open(path))
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        config = read_object(path.read_bytes(), str(path))
        return _of_config(str(path), "config.json", config, None, 0)
    if hub.is_id(model):
        return _of_hub(model)
    raise UserError(
        f"there is no {model}: name a store, a checkpoint's folder, a config.json, or a model of"
        " the Hub as owner/name"
    )


def _of_store(store: Store) -> Described:
    config = read_object((store.config_dir / "config.json").read_bytes(), str(store.config_dir))
    sizes = {name: tensor.nbytes for name, tensor in store.resident_tensors().items()}
    tokenizer = store.config_dir / TOKENIZER
    return Described(
        name=str(store.path), kind="store", config=config, family=store.family,
        activation=store.activation, geometry=store.geometry, resident_bytes=store.resident_bytes,
        multiplied_bytes=multiplied_bytes(sizes), store=store, notes=(),
        embedding_bytes=spare_embedding_bytes(sizes, "float"),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else 0,
    )  # fmt: skip


def _of_folder(folder: Path) -> Described:
    where = folder / "config.json"
    if not where.is_file():
        raise StoreError(f"{folder} is neither store nor checkpoint: it has no {where.name}")
    tokenizer = folder / TOKENIZER
    return _of_config(
        str(folder),
        "checkpoint",
        read_object(where.read_bytes(), str(where)),
        _folder_headers(folder),
        tokenizer.stat().st_size if tokenizer.is_file() else 0,
    )


def _folder_headers(folder: Path) -> dict[str, Tensor] | None:
    """The headers of all safetensors files; None if there are none, as of pickled weights."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        return None
    tensors: dict[str, Tensor] = {}
    for name in _shards(read_object((folder / INDEX).read_bytes(), str(folder / INDEX)), INDEX):
        if not (folder / name).is_file():
            raise StoreError(f"{folder / INDEX} names {name}, which is not in the folder")
        tensors |= read_header(folder / name)
    return tensors


def _of_hub(model: str) -> Described:
    repository = hub.Repository(model)
    raw = repository.read("config.json", CONFIG_BYTES_MAX)
    if raw is None:
        raise UserError(
            f"{repository.where} has no config.json, or there is no such model: see that it is"
            " written right"
        )
    config = read_object(raw, f"config.json of {model}")
    family_named(config.get("model_type"))  # before the headers of what cannot be run
    tensors = _hub_headers(repository)
    tokenizer = repository.size(TOKENIZER)
    return _of_config(model, "Hub", config, tensors, tokenizer or 0)


def _hub_headers(repository: hub.Repository) -> dict[str, Tensor] | None:
    found = _hub_header(repository, SINGLE)
    if found is not None:
        return found
    index = repository.read(INDEX, INDEX_BYTES_MAX)
    if index is None:
        return None
    tensors: dict[str, Tensor] = {}
    for name in _shards(read_object(index, INDEX), INDEX):
        header = _hub_header(repository, name)
        if header is None:
            raise StoreError(f"{repository.where}: {INDEX} names {name}, which is not there")
        tensors |= header
    return tensors


def _hub_header(repository: hub.Repository, name: str) -> dict[str, Tensor] | None:
    raw = repository.header(name)
    return None if raw is None else parse_header(raw, Path(name))


def _shards(index: Mapping[str, Any], where: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StoreError(f"{where} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > SHARDS_MAX or any(Path(name).name != name for name in names):
        raise StoreError(f"{where} names files that are no shards, or more than {SHARDS_MAX}")
    return names


def _of_config(
    name: str,
    kind: Kind,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor] | None,
    tokenizer_bytes: int,
) -> Described:
    family = family_named(config.get("model_type"))
    if config.get("quantization_config"):
        raise StoreError(f"{name} is quantised already; inflash converts 16- and 32-bit floats")
    asked = Config(config, f"config.json of {name}")
    activation = activation_of(family, asked)
    shapes = tensor_shapes(family, asked)
    flash = ffn_weights(family, asked.count("num_hidden_layers"))
    notes: tuple[str, ...] = ()
    if tensors is None:
        dtype, note = _dtype_of(config)
        sizes = {key: items(shape) * DTYPE_BYTES[dtype] for key, shape in shapes.items()}
        notes = (note,)
    else:
        found = _matched(tensors, shapes, name)
        dtype = _one_dtype(found, flash, name)
        sizes = {key: tensor.nbytes for key, tensor in found.items()}
    resident = {key: size for key, size in sizes.items() if key not in flash}
    return Described(
        name=name, kind=kind, config=_with_defaults(asked), family=family.name,
        activation=activation, geometry=geometry_of(family, asked, dtype),
        resident_bytes=sum(resident.values()), multiplied_bytes=multiplied_bytes(resident),
        embedding_bytes=spare_embedding_bytes(resident, "float"),
        tokenizer_bytes=tokenizer_bytes, store=None, notes=notes,
    )  # fmt: skip


def _with_defaults(config: Config) -> dict[str, Any]:
    """The configuration with the sizes that a plan reads, which a store's always has."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings")  # fmt: skip
    return {**config.values, **{name: config.count(name) for name in names}}


def _dtype_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """The number format that a configuration without headers names, and a note on it."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        return "float32", "config.json names no number format: float32 is taken for granted"
    if named not in DTYPE_BYTES:
        raise StoreError(f"config.json: the number format {named!r} is none of"
                         f" {', '.join(DTYPE_BYTES)}")  # fmt: skip
    return str(named), "sizes follow from config.json: there are no safetensors headers to read"


def _matched(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str
) -> dict[str, Tensor]:
    """The tensors by the model's names: old checkpoints leave out, or add, the leading "model."."""
    found = {}
    for key, tensor in tensors.items():
        options = (key, f"model.{key}", key.removeprefix("model."))
        known = next((option for option in options if option in shapes), None)
        if known is not None:
            found[known] = tensor
    if HEAD in tensors and HEAD not in shapes:  # tied: of the two, one may be left out
        found.setdefault(embedding_of(shapes), tensors[HEAD])
    missing = [key for key in shapes if key not in found]
    if missing:
        raise StoreError(f"{name} lacks {len(missing)} tensors, {missing[0]} for one")
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise StoreError(
                f"{name}: {key} has shape {list(found[key].shape)}, config.json says {list(shape)}"
            )
        if found[key].dtype not in DTYPE_BYTES:
            raise StoreError(
                f"{name}: {key} is {found[key].dtype}; supported are {', '.join(DTYPE_BYTES)}"
            )
    return found


def _one_dtype(tensors: Mapping[str, Tensor], flash: set[str], name: str) -> str:
    dtypes = {tensors[key].dtype for key in flash}
    if len(dtypes) != 1:
        raise StoreError(f"{name}: the FFN's tensors are of several dtypes: {sorted(dtypes)}")
    return dtypes.pop()
