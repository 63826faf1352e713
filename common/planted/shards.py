"""Writes a checkpoint's tensors into safetensors shards, as they come, block after block.

The headers are known before the first weight is: names, shapes and their order are decided. One
block is written while the next is made. Files are on the drive when `close` returns, and their
pages are out of the page cache: it would be counted against whoever runs next.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch

from common.store.store import forget_pages
from common.store.tensors import make_header

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
_ITEM_BYTES = 2

Shapes = Sequence[tuple[str, tuple[int, ...]]]


def checkpoint_bytes(shapes: Shapes) -> int:
    """Bytes of all tensors as float16."""
    return sum(_ITEM_BYTES * math.prod(shape) for _, shape in shapes)


def split(shapes: Shapes) -> list[Shapes]:
    """Tensors per file: in their order, at least SHARD_BYTES but for the last."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for item in shapes:
        if checkpoint_bytes(shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(item)
    return list(shards)


class Shards:
    """The files of a folder, being written. Tensors come in the order of `shapes`, as float16."""

    def __init__(self, folder: Path, shapes: Shapes, advance: Callable[[int], None]):
        self._folder = folder
        self._shards = split(shapes)
        self._advance = advance
        self._names = [
            f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            for number in range(1, len(self._shards) + 1)
        ]
        self._left = [
            (shard, name, _ITEM_BYTES * math.prod(shape))
            for shard, shapes in enumerate(self._shards)
            for name, shape in shapes
        ]
        self._open = -1  # number of the file that is written to
        self._file: FileIO | None = None
        self._writer = ThreadPoolExecutor(1, "shards")
        self._pending: Future[None] | None = None

    def write(self, name: str, values: torch.Tensor) -> None:
        """Appends values to the tensor `name`, which must be the one whose turn it is."""
        shard, expected, left = self._left[0]
        half = values.half().contiguous()
        data = half.view(-1).view(torch.uint8).numpy().data
        if name != expected or len(data) > left:
            raise ValueError(f"{len(data)} bytes of {name}; {left} of {expected} come next")
        self._left[0] = (shard, expected, left - len(data))
        if left == len(data):
            self._left.pop(0)
        self._wait()
        self._pending = self._writer.submit(self._append, shard, data)
        self._advance(len(data))

    def close(self) -> None:
        """Waits until the drive has all of it, and writes the index."""
        if self._left:
            raise ValueError(f"{self._left[0][1]} was not written whole")
        self._wait()
        self._finish_file()
        self._writer.shutdown()
        places = {
            name: file
            for file, shapes in zip(self._names, self._shards, strict=True)
            for name, _ in shapes
        }
        total = sum(checkpoint_bytes(shapes) for shapes in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Ends the writing where it is; the files are worthless."""
        self._writer.shutdown()
        if self._file is not None:
            self._file.close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _append(self, shard: int, data: memoryview) -> None:
        if shard != self._open:
            self._finish_file()
            self._file = (self._folder / self._names[shard]).open("wb", buffering=0)
            self._open = shard
            shapes = self._shards[shard]
            self._put(memoryview(make_header((name, "float16", shape) for name, shape in shapes)))
        self._put(data)

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        while data:  # a raw write may be short
            data = data[self._file.write(data) :]

    def _finish_file(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            forget_pages(self._file.fileno())
            self._file.close()
            self._file = None
