"""Reads a whole store again, against its checksums and digests, and names what is wrong.

Does not repair. A bundle is judged by its checksum, so that it can be named; a bundle file also by
its digest, and alone by that if its checksums are themselves damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import StoreError
from common.store.checksum import block_checksums, file_sha256
from common.store.geometry import Geometry
from common.store.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    bundle_file,
    checksum_file,
)
from common.store.partial import JOURNAL
from common.store.store import forget_pages, read_manifest, size_problems
from common.store.tensors import read_exactly

BLOCK_BYTES = 16 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. A bad bundle has layer, neuron and its bytes, first to last."""

    text: str
    path: str
    layer: int | None = None
    neuron: int | None = None
    first_byte: int | None = None
    last_byte: int | None = None


@dataclass(frozen=True)
class Findings:
    """What a store's verification found."""

    problems: tuple[Problem, ...]
    surplus: tuple[str, ...]  # files that the manifest does not name: harmless, but not ours
    bytes_read: int


def store_bytes(path: Path) -> int:
    """Bytes that `verify_store` reads, for a progress bar; `StoreError` if it is no store."""
    return sum(entry.size for entry in read_manifest(path)[0].files)


def verify_store(path: Path, advance: Advance = lambda _: None) -> Findings:
    """Re-reads every file of the store in `path`; `advance` hears of the bytes as they are read.

    `StoreError` if there is no manifest to verify against.
    """
    manifest, _ = read_manifest(path)
    misfits = size_problems(path, manifest)
    problems = [Problem(text, name) for name, text in misfits.items()]
    layers = {bundle_file(layer): layer for layer in range(manifest.geometry.layers)}
    bytes_read = 0
    for entry in manifest.files:
        if entry.path in misfits:
            advance(entry.size)
            continue
        try:
            if entry.path in layers:
                found = _bad_bundles(path, manifest, layers[entry.path], entry, advance)
            else:
                found = _bad_file(path, entry, advance)
            problems.extend(found)
        except (OSError, StoreError) as error:  # a failing drive
            problems.append(Problem(f"{entry.path} cannot be read: {error}", entry.path))
        bytes_read += entry.size
    return Findings(tuple(problems), _surplus(path, manifest), bytes_read)


def _surplus(path: Path, manifest: Manifest) -> tuple[str, ...]:
    known = {entry.path for entry in manifest.files} | {MANIFEST, JOURNAL}
    found = (p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir())
    return tuple(sorted(set(found) - known))


def _bad_file(path: Path, entry: FileEntry, advance: Advance) -> Iterator[Problem]:
    target = path / entry.path
    _from_drive(target)
    if file_sha256(target, advance) != entry.sha256:
        yield Problem(f"{entry.path} is damaged: its SHA-256 is not the manifest's", entry.path)


def _bad_bundles(
    path: Path, manifest: Manifest, layer: int, entry: FileEntry, advance: Advance
) -> Iterator[Problem]:
    geometry = manifest.geometry
    sums_path = path / checksum_file(layer)
    sums_sha256 = {e.path: e.sha256 for e in manifest.files}.get(checksum_file(layer))
    judged = sums_path.is_file() and file_sha256(sums_path) == sums_sha256
    expected = np.fromfile(sums_path, "<u8") if judged else None
    bad: list[int] = []
    digest = hashlib.sha256()
    count = max(1, BLOCK_BYTES // geometry.stride_bytes)
    block = np.empty((count, geometry.stride_bytes), np.uint8)
    target = path / entry.path
    _from_drive(target)
    with target.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for first in range(0, geometry.neurons, count):
            taken = block[: min(count, geometry.neurons - first)]
            bytes_ = taken.data.cast("B")
            read_exactly(file.fileno(), bytes_, first * geometry.stride_bytes, target)
            digested = hasher.submit(digest.update, bytes_)  # beside the checksums
            if expected is not None:
                differs = block_checksums(taken) != expected[first : first + len(taken)]
                bad.extend(first + int(i) for i in np.flatnonzero(differs))
            digested.result()
            advance(len(bytes_))
    yield from (_bundle_problem(geometry, layer, neuron) for neuron in bad)
    if not bad and digest.hexdigest() != entry.sha256:
        yield Problem(f"{entry.path} is damaged: its SHA-256 is not the manifest's", entry.path)


def _bundle_problem(geometry: Geometry, layer: int, neuron: int) -> Problem:
    first = neuron * geometry.stride_bytes
    last = first + geometry.stride_bytes - 1
    name = bundle_file(layer)
    text = f"layer {layer} neuron {neuron} ({name}, bytes {first}-{last}) is damaged"
    return Problem(text, name, layer, neuron, first, last)


def _from_drive(path: Path) -> None:
    """Drops what the page cache has of a file: the drive's bytes are to be verified."""
    with path.open("rb") as file:
        forget_pages(file.fileno())
