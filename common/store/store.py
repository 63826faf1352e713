"""A store, opened: where its files are and what they hold. Reads sizes, not bundles.

Refuses whatever is not a whole store: no folder, no manifest, an unfinished conversion, another
format version, a file that is missing or has another size. `inflash verify` reads the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import StoreError
from common.model.activation import Activation
from common.store.checksum import Checksums, block_checksums
from common.store.geometry import Geometry
from common.store.manifest import (
    BIASES,
    BUNDLES_SUFFIX,
    CONFIG_DIR,
    MANIFEST,
    RESIDENT_DIR,
    Manifest,
    bundle_file,
    checksum_file,
    order_file,
    resident_file,
)
from common.store.tensors import Tensor, read_exactly, read_float32, read_header, to_float32

Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.int32]

PARTIAL_SUFFIX = ".partial"  # of the folder that a conversion writes until it is whole
BLOCK_BYTES = 8 << 20


class Store:
    """What every process needs of a store. Made by `Store.open`."""

    def __init__(self, path: Path, manifest: Manifest, store_id: str):
        self.path = path
        self.id = store_id  # first 16 hex digits of the manifest's SHA-256
        self.manifest = manifest
        self.config_dir = path / CONFIG_DIR

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens the store in the folder `path`; `StoreError` says why it cannot be used."""
        manifest, raw = read_manifest(path)
        for problem in size_problems(path, manifest).values():
            raise StoreError(f"the store {path} is damaged: {problem}; convert the model again")
        return cls(path, manifest, store_id(raw))

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry

    @property
    def family(self) -> str:
        return self.manifest.family

    @property
    def activation(self) -> Activation:
        return self.manifest.activation

    def bundle_path(self, layer: int) -> Path:
        """The layer's bundles: bundle i starts at byte i × stride_bytes."""
        return self.path / bundle_file(layer)

    def checksums(self, layer: int) -> Checksums:
        """uint64 [neurons]: each bundle's checksum, over its whole stride."""
        return np.fromfile(self.path / checksum_file(layer), dtype="<u8")

    def order(self, layer: int) -> Order | None:
        """int32 [neurons]: the checkpoint's neuron at each place, so of each neuron id. None in a
        store that has its neurons in the checkpoint's order. `StoreError` if it is damaged."""
        return read_order(self.path, layer, self.geometry) if self.manifest.placed else None

    def resident_paths(self) -> list[Path]:
        """Safetensors files whose names are those of transformers' model without its FFN."""
        layers = range(self.geometry.layers)
        return [self.path / resident_file(layer) for layer in (None, *layers)]

    def resident_tensors(self) -> dict[str, Tensor]:
        """All tensors of those files, by name: their places, not their bytes."""
        headers = map(read_header, self.resident_paths())
        return {name: tensor for header in headers for name, tensor in header.items()}

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything that stays in memory: resident tensors and the FFN's biases."""
        return sum(f.size for f in self.manifest.files if f.path.startswith(RESIDENT_DIR))

    def check_digests(self) -> None:
        """Re-reads every file but the bundles, which the reader checks one by one; `StoreError`
        names a file that is not as it was written. Its bytes would be wrong text, not an error."""
        for entry in self.manifest.files:
            if entry.path.endswith(BUNDLES_SUFFIX):
                continue
            with (self.path / entry.path).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise StoreError(
                        f"{self.path / entry.path} is damaged: it is not what its digest says;"
                        " run inflash verify, and convert the model again"
                    )
                if not entry.path.startswith(RESIDENT_DIR):  # those are read next
                    forget_pages(file.fileno())

    def biases(self, layer: int) -> dict[str, Floats]:
        """float32 copies of the layer's FFN biases, those that the model has.

        "gate" and "up" are [neurons], "down" is [hidden].
        """
        tensors = read_header(self.path / BIASES)
        named = {part: tensors.get(bias_name(layer, part)) for part in self.geometry.parts}
        return {part: read_float32(t) for part, t in named.items() if t is not None}

    def rows(self, layer: int, part: str) -> Floats:
        """float32 [neurons, hidden]: a copy of one part ("gate", "up", "down") of all bundles.

        A row is NaN if its bundle's checksum is wrong: what depends on it cannot pass unnoticed.
        """
        shape = self.geometry
        begin = shape.parts.index(part) * shape.row_bytes
        rows = np.empty((shape.neurons, shape.hidden), np.float32)
        count = max(1, BLOCK_BYTES // shape.stride_bytes)
        block = np.empty((count, shape.stride_bytes), np.uint8)
        path, checksums = self.bundle_path(layer), self.checksums(layer)
        with path.open("rb", buffering=0) as file:
            for first in range(0, shape.neurons, count):
                taken = block[: min(count, shape.neurons - first)]
                view = taken.data.cast("B")
                read_exactly(file.fileno(), view, first * shape.stride_bytes, path)
                raw = taken[:, begin : begin + shape.row_bytes]
                rows[first : first + len(taken)] = _to_float32(raw, shape)
                wrong = block_checksums(taken) != checksums[first : first + len(taken)]
                rows[first : first + len(taken)][wrong] = np.nan
            forget_pages(file.fileno())
        return rows


def _to_float32(raw: npt.NDArray[np.uint8], geometry: Geometry) -> Floats:
    """Rows [count, hidden] of bundles as they lie, uint8 [count, row_bytes]."""
    if not geometry.packed:
        return to_float32(raw, geometry.dtype)
    # Here, for numba, which takes a process a third of its start: gateway and reader open stores,
    # and read no row.
    from common.packed import unpacked

    return unpacked(raw, geometry.packed, geometry.hidden)


def read_order(folder: Path, layer: int, geometry: Geometry) -> Order:
    """int32 [neurons], of the store or partial store in `folder`; `StoreError` if it is damaged."""
    path = folder / order_file(layer)
    order = np.fromfile(path, "<i4").astype(np.int32, copy=False)
    if not np.array_equal(np.sort(order), np.arange(geometry.neurons)):
        raise StoreError(
            f"{path} is damaged: it does not name every neuron once; run inflash verify, and"
            " convert the model again"
        )
    return order


def store_id(manifest: bytes) -> str:
    """A store's id, from its manifest's bytes."""
    return hashlib.sha256(manifest).hexdigest()[:16]


def read_end_ids(config_dir: Path) -> frozenset[int]:
    """The model's end tokens: from generation_config.json where it names any, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = config_dir / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def bias_name(layer: int, part: str) -> str:
    """A bias's name in the biases' file."""
    return f"layers.{layer}.{part}.bias"


def read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """The manifest of a finished store, and its bytes; `StoreError` if there is none."""
    if not path.is_dir():
        raise StoreError(f"there is no store at {path}: no such folder")
    if path.absolute().name.endswith(PARTIAL_SUFFIX):
        raise StoreError(
            f"{path} is an unfinished conversion: run the same `inflash convert` again to finish it"
        )
    where = path / MANIFEST
    try:
        raw = where.read_bytes()
    except FileNotFoundError:
        hint = ""
        if (path / "config.json").is_file():
            hint = f"; it looks like a checkpoint: `inflash convert {path} STORE` makes one of it"
        raise StoreError(f"{path} is no store: it has no {MANIFEST}{hint}") from None
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror}") from None
    return Manifest.from_json(raw, where), raw


def size_problems(path: Path, manifest: Manifest) -> dict[str, str]:
    """Files that the manifest lacks, or that are missing or of another size on disk.

    The file's name in the store -> a sentence that says what is wrong with it.
    """
    sizes = {entry.path: entry.size for entry in manifest.files}
    problems = {}
    for name, size in _expected(manifest).items():
        if name not in sizes:
            problems[name] = f"its manifest lacks {name}"
        elif size is not None and sizes[name] != size:
            problems[name] = f"its manifest gives {name} {sizes[name]:,} bytes, not {size:,}"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            problems[name] = f"{name} is missing"
            continue
        if found != size:
            problems[name] = f"{name} has {found:,} bytes, its manifest says {size:,}"
    return problems


def _expected(manifest: Manifest) -> dict[str, int | None]:
    """Files that every such store has, with the sizes that follow from its geometry."""
    geometry = manifest.geometry
    names: dict[str, int | None] = {f"{CONFIG_DIR}/config.json": None, BIASES: None}
    names[resident_file(None)] = None
    for layer in range(geometry.layers):
        names[bundle_file(layer)] = geometry.layer_bytes
        names[checksum_file(layer)] = 8 * geometry.neurons
        names[resident_file(layer)] = None
        if manifest.placed:
            names[order_file(layer)] = 4 * geometry.neurons
    return names


def forget_pages(fd: int) -> None:
    """Drops the file's clean pages from the page cache: it is charged to whoever caused it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
