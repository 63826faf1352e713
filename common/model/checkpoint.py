"""A Hugging Face checkpoint on disk: its configuration, and where each tensor's bytes lie.

Safetensors or pickled .bin, single or sharded; safetensors if both are there. No weight is loaded
or mapped here: a tensor is a place in a file, and whoever needs bytes reads them in blocks. Refuses
what is no checkpoint, and weight files that are truncated or corrupt.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from common.errors import StoreError
from common.json_object import read_object
from common.model.families import family_named
from common.store.tensors import Tensor, read_header

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's folder holds. Made by `open_checkpoint`."""

    folder: Path
    config: Any  # transformers' configuration object
    config_json: dict[str, Any]  # as written
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]  # by the name that the file gives

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    def fingerprint(self) -> str:
        """Changes when a file of the folder does: a conversion resumes only from the same."""
        digest = hashlib.sha256(json.dumps(self.config_json, sort_keys=True).encode())
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's configuration and headers; `StoreError` says why it cannot be used."""
    if not folder.is_dir():
        raise StoreError(f"there is no checkpoint at {folder}: no such folder")
    config_json = _read_json(folder / "config.json")
    family_named(config_json.get("model_type"))  # transformers' own refusal would name 400 others
    if config_json.get("quantization_config"):
        raise StoreError(f"{folder} is quantised already; inflash converts 16- and 32-bit floats")
    files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= read_header(path) if path.suffix == ".safetensors" else read_pickled(path)
    return Checkpoint(folder, _load_config(folder), config_json, files, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    return read_object(raw, str(path))


def _load_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks values with a tree of errors of its own
        reason = " ".join(str(error).split())
        raise StoreError(f"{folder / 'config.json'} is refused by transformers: {reason}") from None


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (folder / single).is_file():  # transformers' own order
            return (folder / single,)
        if (folder / index).is_file():
            return _shards(folder / index)
    raise StoreError(
        f"{folder} has no weights: none of {', '.join(_SINGLE)} nor an index of shards"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StoreError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise StoreError(f"{index} names {name}, which is not in the folder")
    return tuple(index.parent / name for name in names)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled .bin by name, without its bytes; `StoreError` if it is no such.

    Loaded to the meta device with `weights_only`: shapes and offsets come, weights do not. Mapping
    the file instead would count every page of it that is read as ours.
    """
    starts = _record_starts(path)
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # pickle's errors are any
        reason = str(error).partition("\n")[0]
        raise StoreError(f"{path} is truncated, corrupt or not weights only: {reason}") from None
    if not isinstance(state, dict):
        raise StoreError(f"{path} holds no tensors by name")
    values = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {name: _place(name, value, path, starts) for name, value in values.items()}


def _place(name: str, value: torch.Tensor, path: Path, starts: Mapping[int, int]) -> Tensor:
    """Where in the file a tensor that torch loaded to the meta device has its bytes."""
    start: int | None = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None or start not in starts:
        raise StoreError(f"{path}: torch {torch.__version__} does not say where {name} lies")
    if not value.is_contiguous():
        raise StoreError(f"{path}: {name} is stored transposed; save it as safetensors first")
    offset = start + int(value.storage_offset()) * value.element_size()
    if offset + value.nbytes > start + starts[start]:
        raise StoreError(f"{path} is corrupt: {name} does not fit in its record")
    dtype = str(value.dtype).removeprefix("torch.")
    return Tensor(name, path, offset, dtype, tuple(value.shape), value.nbytes)


def _record_starts(path: Path) -> dict[int, int]:
    """Where the zip's uncompressed records begin, and their sizes: checks what torch says."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            starts = {}
            for info in archive.infolist():
                file.seek(info.header_offset + 26)
                lengths = file.read(4)  # of the local header's name and extra fields
                start = info.header_offset + 30
                start += int.from_bytes(lengths[:2], "little")
                start += int.from_bytes(lengths[2:], "little")
                if info.compress_type == zipfile.ZIP_STORED:
                    starts[start] = info.file_size
            return starts
    except zipfile.BadZipFile:
        raise StoreError(
            f"{path} is truncated, or was written by torch before 1.6: load and save it again with"
            " a newer one"
        ) from None
