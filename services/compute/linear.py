"""The model's own linear modules, for steps of one token: a product of matrix and vector.

torch's `linear` takes one row of half precision through a matrix product that runs at half the
speed of `mv`, which oneDNN has a kernel for (docs/measurements.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RowLinear(nn.Module):
    """`linear` with its own parameters; a single row is multiplied by `mv`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of `x` [..., inputs]."""
        if x.numel() != x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        row = x.reshape(-1)
        if self.bias is None:
            out = torch.mv(self.weight, row)
        else:
            out = torch.addmv(self.bias, self.weight, row)
        return out.view(*x.shape[:-1], -1)


def multiply_rows(model: nn.Module) -> None:
    """Puts a RowLinear in the place of every linear module; parameters stay the same objects."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, RowLinear(module))
