"""The model's own linear modules: products of resident rows with a token, or a block of tokens.

Rows are as the model has them, or packed (common/packed.py) as they are read from the store, so
that float and packed rows never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.kernels import BITS, row_starts
from common.packed import scales_of
from common.store.geometry import DTYPE_BYTES, row_bytes
from common.store.store import forget_pages
from common.store.tensors import Tensor, read_exactly, to_float32
from services.compute.blocks import Tokens
from services.compute.products import Bits, Products, Starts, bits_of
from services.compute.turns import median_us

PROBE_TURNS = 7
CHUNK_ROWS = 512  # of a matrix that are read and packed at a time


@dataclass(frozen=True)
class Rows:
    """A matrix: its rows begin at `starts` of `items`, which names their number format."""

    items: Bits
    starts: Starts


class RowLinear(nn.Module):
    """A linear module over `rows`, computed in float32."""

    def __init__(self, rows: Rows, bias: torch.Tensor | None, products: Products):
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._products = products
        self._eight: tuple[torch.Tensor, torch.Tensor] | None = None
        self._few = products.few_at_most(rows.items)  # tokens, and not a block
        self._others: list[RowLinear] = []  # a list: they are no modules of this one
        # For an input what another has made for this one: its product; or a block, laid out.
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        self._laid_out: tuple[torch.Tensor, Tokens] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of `x` [..., tokens of a sequence, inputs], or of one token [inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        if x.dim() > 1 and x.shape[-2] > self._few:
            return self._of_block(x, rows).view(*x.shape[:-1], -1)
        out = self._of_few(x, rows.float())  # of one sequence, or a token of each of some
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def take_torch(self) -> None:
        """Has products of one token made by torch's kernel: of int8 rows, see `Int8Probe`."""
        self._eight = int8_of(self.rows)

    def lead(self, others: list[RowLinear]) -> None:
        """`others` will be given the same input after this module: a few tokens' products with
        theirs are made with this one's, so that the threads meet once, and a block is laid out
        once."""
        self._others = others
        few = min(module._few for module in (self, *others))  # their rows may be of several formats
        for module in (self, *others):
            module._few = few

    def _of_few(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        if self._eight is not None:
            return by_torch(rows, *self._eight)
        all_of_us = [self, *(other for other in self._others if other._eight is None)]
        out, *more = self._products.dot_each(
            [(m.rows.items, m.rows.starts) for m in all_of_us], rows
        )
        for other, its in zip(all_of_us[1:], more, strict=True):
            other._made = x, its
        return out

    def _of_block(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        given, self._laid_out = self._laid_out, None
        if given is not None and given[0] is x:
            tokens = given[1]
        else:
            tokens = self._products.tokens(rows)
            for other in self._others:
                other._laid_out = x, tokens
        out = x.new_empty(len(rows), len(self.rows.starts))

        def take(first: int, end: int, products: torch.Tensor) -> None:
            if self.bias is not None:
                products += self.bias[first:end, None]
            out[:, first:end] = products.T

        self._products.dot_block(self.rows.items, self.rows.starts, tokens, take)
        return out


def rows_of(weight: torch.Tensor) -> Rows:
    """The rows of a contiguous matrix [rows, width], not copied."""
    return Rows(bits_of(weight), row_starts(*weight.shape))


def pack(tensor: Tensor, number_format: str, products: Products) -> Rows:
    """A matrix of the store, packed while it is read."""
    count, width = tensor.shape
    size, source = row_bytes(number_format, width), DTYPE_BYTES[tensor.dtype] * width
    items = np.zeros(count * size, np.uint8).view(BITS[number_format])
    starts = row_starts(count, size)
    raw = np.empty((min(CHUNK_ROWS, count), source), np.uint8)
    with tensor.path.open("rb", buffering=0) as file:
        for first in range(0, count, CHUNK_ROWS):
            some = raw[: min(CHUNK_ROWS, count - first)]
            offset = tensor.offset + first * source
            read_exactly(file.fileno(), some.data.cast("B"), offset, tensor.path)
            wide = to_float32(some, tensor.dtype)
            products.pack(wide, items, starts[first : first + len(some)])
        forget_pages(file.fileno())
    return Rows(items, starts)


def int8_of(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows as torch takes them: the matrix, not copied, and its scales, float32 [rows]."""
    matrix = torch.from_numpy(rows.items).view(len(rows.starts), -1)
    return matrix, torch.from_numpy(scales_of(rows.items, rows.starts))


def by_torch(x: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """torch's product of an int8 matrix and each of a few vectors, `x` float32 [vectors, width]. In
    bfloat16 it may run faster, and would lose more than int8 does."""
    return torch._weight_int8pack_mm(x, matrix, scales)


@dataclass(frozen=True)
class Int8Probe:
    """How long a product of int8 rows takes here: by our kernel, and by torch's. Microseconds."""

    ours_us: float
    torch_us: float

    @property
    def way(self) -> str:
        return "torch" if self.torch_us < self.ours_us else "ours"


def probe_int8(linear: RowLinear) -> Int8Probe:
    """Times both on a module's own int8 rows, by turns; medians."""
    row = torch.ones(len(linear.rows.items) // len(linear.rows.starts))
    matrix, scales = int8_of(linear.rows)
    ways: dict[str, Callable[[], object]] = {
        "ours_us": lambda: linear(row),
        "torch_us": lambda: by_torch(row[None], matrix, scales),
    }
    return Int8Probe(**median_us(ways, PROBE_TURNS))


def choose_int8(model: nn.Module) -> Int8Probe | None:
    """Chooses who multiplies the model's int8 rows, by its largest matrix; None if it has none."""
    found = [
        m for m in model.modules() if isinstance(m, RowLinear) and m.rows.items.dtype == np.int8
    ]
    if not found:
        return None
    probe = probe_int8(max(found, key=lambda linear: linear.rows.items.nbytes))
    if probe.way == "torch":
        for linear in found:
            linear.take_torch()
    return probe


def multiply_rows(
    model: nn.Module, products: Products, packed: Mapping[str, Rows], together: Sequence[str]
) -> None:
    """Puts a RowLinear in the place of every linear module, over its rows in `packed`, by its
    weight's name, or else over its own weight. Those that are named `together` are made so."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            rows = packed.get(f"{name}.weight") or rows_of(module.weight)
            model.set_submodule(name, RowLinear(rows, module.bias, products))
    for module in list(model.modules()):
        members = [getattr(module, name, None) for name in together]
        found = [member for member in members if isinstance(member, RowLinear)]
        if found:
            found[0].lead(found[1:])
