"""Row-column bundling: a layer's matrices, read in blocks, become bundles side by side.

Memory is bounded by BLOCK_BYTES whatever the layer's size: a block is some neurons' bundles, its
rows are read as they lie, and its columns (the transposed part) as a strip of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from common.model.families import TRANSPOSED
from common.store.checksum import Checksums, block_checksums
from common.store.geometry import Geometry
from common.store.tensors import Tensor, read_exactly

Block = npt.NDArray[np.uint8]

BLOCK_BYTES = 64 << 20  # of bundles; rows and columns on their way in take as much again
_STRIP = 32  # columns of a transposed copy that stay in the processor's cache together


def write_bundles(
    weights: Mapping[str, Tensor], geometry: Geometry, write: Callable[[memoryview], None]
) -> Checksums:
    """Gives a layer's bundles to `write` in order, stride by stride; returns their checksums.

    `weights` has a tensor for each part: [neurons, hidden], the transposed part [hidden, neurons].
    """
    count = max(1, min(BLOCK_BYTES // geometry.stride_bytes, geometry.neurons))
    row_bytes = geometry.hidden * geometry.item_bytes
    block = np.zeros((count, geometry.stride_bytes), np.uint8)  # the padding stays zero
    matrix = np.empty(count * row_bytes, np.uint8)
    checksums = np.empty(geometry.neurons, "<u8")
    for first in range(0, geometry.neurons, count):
        part_of = block[: min(count, geometry.neurons - first)]
        for index, part in enumerate(geometry.parts):
            target = part_of[:, index * row_bytes : (index + 1) * row_bytes]
            read = _read_columns if part == TRANSPOSED else _read_rows
            read(weights[part], geometry, first, target, matrix)
        checksums[first : first + len(part_of)] = block_checksums(part_of)
        write(part_of.data.cast("B"))
    return checksums


def _read_rows(
    tensor: Tensor, geometry: Geometry, first: int, target: Block, buffer: Block
) -> None:
    rows = buffer[: target.size].reshape(target.shape)
    tensor.read_into(rows.data.cast("B"), first * target.shape[1])
    target[:] = rows


def _read_columns(
    tensor: Tensor, geometry: Geometry, first: int, target: Block, buffer: Block
) -> None:
    """Columns `first`... of [hidden, neurons] into the rows of `target`."""
    item, width = geometry.item_bytes, len(target)
    strip = buffer[: target.size].reshape(geometry.hidden, width * item)
    if width == geometry.neurons:
        tensor.read_into(strip.data.cast("B"))
    else:
        _read_strip(tensor, geometry, first, strip)
    word = np.uint16 if item == 2 else np.uint32
    columns, rows = strip.view(word), target.view(word)
    for begin in range(0, geometry.hidden, _STRIP):  # at once, it runs at a tenth of the speed
        rows[:, begin : begin + _STRIP] = columns[begin : begin + _STRIP].T


def _read_strip(tensor: Tensor, geometry: Geometry, first: int, strip: Block) -> None:
    row_bytes = geometry.neurons * geometry.item_bytes
    offset = tensor.offset + first * geometry.item_bytes
    with tensor.path.open("rb", buffering=0) as file:
        for index, row in enumerate(strip):
            read_exactly(file.fileno(), row.data, offset + index * row_bytes, tensor.path)
