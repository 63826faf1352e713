"""Checksums: one 64-bit number per bundle, a SHA-256 per file.

The bundle's covers its whole stride, padding included: the reader checks what it read, as it lies
in the slot, without knowing what is inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Checksums = npt.NDArray[np.uint64]

CHUNK_BYTES = 8 << 20


def bundle_checksum(buffer: Any) -> int:
    """XXH3-64 of a contiguous buffer: the whole stride of one bundle."""
    checksum: int = xxhash.xxh3_64_intdigest(buffer)
    return checksum


def block_checksums(block: npt.NDArray[np.uint8]) -> Checksums:
    """One checksum per row of `block`, uint8 [bundles, stride_bytes]."""
    intdigest = xxhash.xxh3_64_intdigest  # a local name: this loop runs once per bundle
    return np.fromiter((intdigest(row) for row in block), dtype=np.uint64, count=len(block))


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Hex SHA-256 of a file's bytes; `progress` hears of each chunk's size."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
