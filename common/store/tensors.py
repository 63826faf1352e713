"""Safetensors files without torch: headers, bounded reads, and a writer that streams.

    byte 0       u64 little-endian: n, the header's length
    byte 8       n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    byte 8 + n   the tensors' bytes; offsets count from here

Refuses headers that do not add up: the file is then truncated or is something else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import StoreError
from common.store.geometry import DTYPE_BYTES

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_NAMES = {code: name for name, code in DTYPES.items()}
# The format's other types: their sizes let a header be checked before a tensor is refused.
_OTHER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8}
_OTHER_BYTES |= {"I64": 8, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_HEADER_BYTES_MAX = 100_000_000  # the format's own bound


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a file: contiguous, row-major, little-endian."""

    name: str
    path: Path
    offset: int  # bytes from the start of the file
    dtype: str  # a key of DTYPES, or the file's own word for another
    shape: tuple[int, ...]
    nbytes: int

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fills `buffer` with the tensor's bytes from byte `start`; `StoreError` if cut short."""
        with self.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), buffer, self.offset + start, self.path)


def read_exactly(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills `buffer` from byte `offset` of `fd`; `StoreError` if the file is too short."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            raise StoreError(f"{path} is truncated: it ends at byte {offset + done:,}")
        done += count


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; `StoreError` says what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        header_bytes = int.from_bytes(length, "little")
        if size < 8 or header_bytes > min(size - 8, _HEADER_BYTES_MAX):
            raise StoreError(f"{path} is truncated or is no safetensors file")
        tensors = parse_header(length + file.read(header_bytes), path)
    end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
    if end > size:
        raise StoreError(f"{path} is truncated: {size:,} bytes, its header promises {end:,}")
    return tensors


def parse_header(raw: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors that `raw`, a length and a header, promises of the file `path`; `StoreError`."""
    try:
        header = json.loads(raw[8:])
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        return {k: _entry(k, v, path, len(raw)) for k, v in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} has a corrupt safetensors header: {error}") from None


def _entry(name: str, entry: Mapping[str, Any], path: Path, base: int) -> Tensor:
    code, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    dtype = _NAMES.get(code, code)
    item = DTYPE_BYTES.get(dtype, _OTHER_BYTES.get(dtype))
    if begin < 0 or end < begin or (item and end - begin != item * math.prod(shape)):
        raise ValueError(f"{name}: {code} {list(shape)} does not fill bytes {begin} to {end}")
    return Tensor(name, path, base + begin, dtype, shape, end - begin)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and JSON for tensors (name, dtype, shape) that follow it in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors begin at a multiple of 8, as the format advises
    return len(raw).to_bytes(8, "little") + raw


def to_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """A float32 copy of bytes (uint8, any number of dimensions, last one contiguous) of `dtype`."""
    if dtype == "bfloat16":  # numpy has none: it is the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)


def read_float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """A float32 copy of a whole tensor, in its shape; for small ones."""
    raw = np.empty(tensor.nbytes, np.uint8)
    tensor.read_into(raw.data)
    return to_float32(raw, tensor.dtype).reshape(tensor.shape)
