"""The model's own linear modules: products of resident rows with a token, or a block of tokens."""

from __future__ import annotations

import torch
from torch import nn

from common.kernels import row_starts
from services.compute.products import Products, bits_of


class RowLinear(nn.Module):
    """`linear` with its own parameters, computed in float32."""

    def __init__(self, linear: nn.Linear, products: Products):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._products = products
        self._items = bits_of(self.weight)
        self._starts = row_starts(*self.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of `x` [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        out = self._row(rows[0]) if len(rows) == 1 else self._block(rows)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def _row(self, row: torch.Tensor) -> torch.Tensor:
        return self._products.dot(self._items, self._starts, row)

    def _block(self, rows: torch.Tensor) -> torch.Tensor:
        made = self._products.dot_block(self._items, self._starts, rows.T.contiguous())
        return made.T.contiguous()


def multiply_rows(model: nn.Module, products: Products) -> None:
    """Puts a RowLinear in the place of every linear module; parameters stay the same objects."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, RowLinear(module, products))
