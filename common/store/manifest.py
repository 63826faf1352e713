"""manifest.json: what a store holds. Written last; names every other file with size and digest.

Refuses another format, another version, and fields that are missing or of the wrong type.
docs/store-format.md describes every field.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StoreError
from common.model.activation import Activation
from common.store.geometry import DTYPE_BYTES, PACKED, Geometry, pack_problem

MANIFEST = "manifest.json"
FORMAT = "inflash-store"
VERSION = 1

# Where the scales of a packed row are: docs/store-format.md.
_SCALES = {"int8": "row-bits", "int4": "row-end"}

CONFIG_DIR = "config"
RESIDENT_DIR = "resident"
BIASES = f"{RESIDENT_DIR}/ffn-biases.safetensors"


BUNDLES_SUFFIX = ".bundles"


def bundle_file(layer: int) -> str:
    return f"layers/{layer:03}{BUNDLES_SUFFIX}"


def checksum_file(layer: int) -> str:
    return f"layers/{layer:03}.checksums"


def order_file(layer: int) -> str:
    """Which neuron of the checkpoint lies where: of a store that was placed by a trace."""
    return f"layers/{layer:03}.order"


def resident_file(layer: int | None) -> str:
    """The resident tensors of a layer, or (None) of everything around the layers."""
    return f"{RESIDENT_DIR}/{'model' if layer is None else f'layer-{layer:03}'}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """A file of the store: its path within, and what its bytes must be."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest's content. Nothing in it depends on when or where it was written."""

    family: str
    activation: Activation
    geometry: Geometry
    source: str  # name of the checkpoint's folder
    source_files: tuple[str, ...]
    files: tuple[FileEntry, ...]

    @property
    def placed(self) -> bool:
        """Whether neurons lie in another order than the checkpoint's: then every layer has one."""
        orders = {order_file(layer) for layer in range(self.geometry.layers)}
        return any(entry.path in orders for entry in self.files)

    def to_json(self) -> bytes:
        """The file's bytes: the same manifest always gives the same ones."""
        geometry = self.geometry
        shape = dataclasses.asdict(geometry)
        del shape["packed"]  # it is the number format's kind
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"family": self.family, "activation": dataclasses.asdict(self.activation)},
            "geometry": shape,
            "bundle": {
                "parts": list(geometry.parts),
                "bytes": geometry.bundle_bytes,
                "stride_bytes": geometry.stride_bytes,
                "checksum": "xxh3_64",
            },
            # A reader that does not know a kind refuses it by its name: no new version.
            "number_format": {
                "kind": geometry.number_format,
                "scales": _SCALES.get(geometry.number_format),
            },
            "source": {"name": self.source, "files": list(self.source_files)},
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, raw: bytes, where: Path) -> Manifest:
        """Reads what `to_json` wrote; `StoreError` names what is wrong with it."""
        try:
            content = json.loads(raw)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if content["version"] != VERSION:
                raise StoreError(
                    f"{where} has format version {content['version']}, this inflash reads"
                    f" {VERSION}: convert the model again, or use the inflash that made it"
                )
            return cls._of(content)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{where} is no store manifest: {_reason(error)}") from None

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Manifest:
        number_format = content["number_format"]
        kind = number_format["kind"]
        packed = kind if kind in PACKED else ""
        geometry = _typed(Geometry, content["geometry"] | {"packed": packed})
        counts = (geometry.layers, geometry.neurons, geometry.hidden)
        if min(counts) < 1 or geometry.layers > len(content["files"]):
            raise ValueError(f"its geometry is of no model: {geometry}")
        if geometry.dtype not in DTYPE_BYTES:
            raise ValueError(f"its dtype is {geometry.dtype!r}")
        if kind not in (*DTYPE_BYTES, *PACKED) or number_format["scales"] != _SCALES.get(kind):
            raise ValueError(f"number format {kind!r} is not known")
        if problem := pack_problem(kind, geometry.hidden):
            raise ValueError(problem)
        bundle = content["bundle"]
        if (kind, bundle["bytes"], bundle["stride_bytes"]) != (
            geometry.number_format,
            geometry.bundle_bytes,
            geometry.stride_bytes,
        ):
            raise ValueError("the bundle's size does not follow from the geometry")
        files = tuple(_typed(FileEntry, entry) for entry in content["files"])
        for entry in files:
            if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
                raise ValueError(f"file {entry.path!r} lies outside of the store")
        return cls(
            family=str(content["model"]["family"]),
            activation=_typed(Activation, content["model"]["activation"]),
            geometry=geometry,
            source=str(content["source"]["name"]),
            source_files=tuple(str(name) for name in content["source"]["files"]),
            files=files,
        )


_TYPES = {"int": int, "str": str, "bool": bool, "float": float}


def _typed(kind: Any, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `kind`, whose fields are scalars, each of its own type."""
    for field in dataclasses.fields(kind):
        expected = _TYPES[str(field.type)]
        if type(values[field.name]) is not expected:
            raise TypeError(f"{field.name} is {values[field.name]!r}, no {expected.__name__}")
    return kind(**values)


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
