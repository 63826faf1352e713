"""Row-column bundling: a layer's matrices, read in blocks, become bundles side by side.

Their rows are copied as they are, or packed (common/packed.py); what packing loses is added up.
Memory is bounded by BLOCK_BYTES whatever the layer's size: a block is some neurons' bundles, its
rows are read as they lie, and its columns (the transposed part) as a strip of every row. In another
order than the checkpoint's, rows are read one by one, and strips are picked from whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import StoreError
from common.model.families import TRANSPOSED
from common.packed import packed, unpacked
from common.store.checksum import Checksums, block_checksums
from common.store.geometry import Geometry
from common.store.store import Order
from common.store.tensors import Tensor, read_exactly, to_float32

Block = npt.NDArray[np.uint8]

BLOCK_BYTES = 64 << 20  # of bundles; rows and columns on their way in take as much again
_STRIP = 32  # columns of a transposed copy that stay in the processor's cache together


@dataclass(frozen=True)
class Reordered(Tensor):
    """A tensor whose row i, along its first axis, is row `order[i]` of the file's."""

    order: Order

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        row_bytes = self.nbytes // self.shape[0]
        first, last = start // row_bytes, -(-(start + len(buffer)) // row_bytes)
        rows = np.empty((last - first, row_bytes), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for row, source in zip(rows, self.order[first:last].tolist(), strict=True):
                read_exactly(file.fileno(), row.data, self.offset + source * row_bytes, self.path)
        begin = start - first * row_bytes
        buffer[:] = rows.reshape(-1)[begin : begin + len(buffer)].data


def reordered(tensor: Tensor, order: Order | None) -> Tensor:
    """`tensor` with its rows in `order`, or as it is."""
    return tensor if order is None else Reordered(**vars(tensor), order=order)


@dataclass(frozen=True)
class Loss:
    """What packing some rows lost: sums over their numbers."""

    squared_error: float
    squared: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.squared_error + other.squared_error, self.squared + other.squared)

    @property
    def relative(self) -> float:
        """Root mean square of the error by that of the numbers."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0


def write_bundles(
    weights: Mapping[str, Tensor],
    geometry: Geometry,
    write: Callable[[memoryview], None],
    order: Order | None = None,
) -> tuple[Checksums, Loss | None]:
    """Gives a layer's bundles to `write` in order, stride by stride; returns their checksums, and
    what was lost if they are packed. `StoreError` if they cannot be.

    `weights` has a tensor for each part: [neurons, hidden], the transposed part [hidden, neurons].
    With `order` [neurons], bundle i is that of neuron `order[i]`; else of neuron i.
    """
    row_bytes = geometry.hidden * geometry.item_bytes
    widest = max(geometry.stride_bytes, 4 * geometry.hidden * (2 if geometry.packed else 0))
    count = max(1, min(BLOCK_BYTES // widest, geometry.neurons))
    block = np.zeros((count, geometry.stride_bytes), np.uint8)  # the padding stays zero
    source = np.empty((count if geometry.packed else 0, row_bytes), np.uint8)
    matrix = np.empty(count * row_bytes, np.uint8)
    checksums, losses = np.empty(geometry.neurons, "<u8"), [0.0, 0.0]
    for first in range(0, geometry.neurons, count):
        part_of = block[: min(count, geometry.neurons - first)]
        for index, part in enumerate(geometry.parts):
            begin = index * geometry.row_bytes
            target = part_of[:, begin : begin + geometry.row_bytes]
            rows = source[: len(part_of)] if geometry.packed else target
            if part == TRANSPOSED:
                _read_columns(weights[part], geometry, first, rows, matrix, order)
            else:
                _read_rows(reordered(weights[part], order), first, rows, matrix)
            if geometry.packed:
                wide = to_float32(rows, geometry.dtype)
                _check_finite(weights[part], wide)
                target[:] = packed(wide, geometry.packed)
                lost = unpacked(target, geometry.packed, geometry.hidden) - wide
                losses[0] += float(np.vdot(lost, lost))
                losses[1] += float(np.vdot(wide, wide))
        checksums[first : first + len(part_of)] = block_checksums(part_of)
        write(part_of.data.cast("B"))
    return checksums, Loss(*losses) if geometry.packed else None


def _check_finite(tensor: Tensor, rows: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(rows).all():
        raise StoreError(
            f"tensor {tensor.name} has numbers that are not finite, which cannot be packed: convert"
            " it with --bundles float"
        )


def _read_rows(tensor: Tensor, first: int, target: Block, buffer: Block) -> None:
    rows = buffer[: target.size].reshape(target.shape)
    tensor.read_into(rows.data.cast("B"), first * target.shape[1])
    target[:] = rows


def _read_columns(
    tensor: Tensor,
    geometry: Geometry,
    first: int,
    target: Block,
    buffer: Block,
    order: Order | None,
) -> None:
    """Columns `first`..., or `order[first]`..., of [hidden, neurons] into the rows of `target`."""
    item, width = geometry.item_bytes, len(target)
    word = np.uint16 if item == 2 else np.uint32
    strip = buffer[: target.size].reshape(geometry.hidden, width * item)
    columns, rows = strip.view(word), target.view(word)
    if order is not None:
        _pick_strip(tensor, geometry, order[first : first + width], columns)
    elif width == geometry.neurons:
        tensor.read_into(strip.data.cast("B"))
    else:
        _read_strip(tensor, geometry, first, strip)
    for begin in range(0, geometry.hidden, _STRIP):  # at once, it runs at a tenth of the speed
        rows[:, begin : begin + _STRIP] = columns[begin : begin + _STRIP].T


def _read_strip(tensor: Tensor, geometry: Geometry, first: int, strip: Block) -> None:
    row_bytes = geometry.neurons * geometry.item_bytes
    offset = tensor.offset + first * geometry.item_bytes
    with tensor.path.open("rb", buffering=0) as file:
        for index, row in enumerate(strip):
            read_exactly(file.fileno(), row.data, offset + index * row_bytes, tensor.path)


def _pick_strip(tensor: Tensor, geometry: Geometry, chosen: Order, strip: npt.NDArray[Any]) -> None:
    """Columns `chosen` of [hidden, neurons] into `strip` [hidden, chosen], of words."""
    whole = np.empty(geometry.neurons, strip.dtype)
    with tensor.path.open("rb", buffering=0) as file:
        for index, row in enumerate(strip):
            offset = tensor.offset + index * whole.nbytes
            read_exactly(file.fileno(), whole.data.cast("B"), offset, tensor.path)
            np.take(whole, chosen, out=row, mode="clip")  # the default would copy once more
