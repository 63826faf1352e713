"""The tokens' embedding that stays on flash: of it a token takes one row, and no more is read.

Direct reads would ask for aligned rows, which a safetensors file does not promise. So these are
buffered, without reading ahead, and what they leave in the page cache is dropped.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from common.errors import StoreError
from common.store.store import forget_pages
from common.store.tensors import Tensor, read_exactly
from services.compute.failures import StepFailedError

_HAS_ADVICE = hasattr(os, "posix_fadvise")


class FlashEmbedding(nn.Module):
    """Stands where the model's embedding stood: `tensor` [vocabulary, width] stays in its file."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """`dtype` is the model's, in which rows are given."""
        super().__init__()
        self._tensor = tensor
        self._dtype = dtype
        self._stored = getattr(torch, tensor.dtype)
        self._row_bytes = tensor.nbytes // tensor.shape[0]
        self._file = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        if _HAS_ADVICE:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of tokens `ids` [...]: [..., width]. StepFailedError if one cannot be read."""
        different, places = torch.unique(ids, return_inverse=True)
        return self._read(different.tolist()).to(self._dtype)[places]

    def _read(self, ids: list[int]) -> torch.Tensor:
        rows = torch.empty(len(ids), self._tensor.shape[1], dtype=self._stored)
        raw, size = rows.view(torch.uint8).numpy(), self._row_bytes
        offsets = [self._tensor.offset + number * size for number in ids]
        if _HAS_ADVICE and len(ids) > 1:  # the drive makes them at once
            for offset in offsets:
                os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)
        try:
            for row, offset in zip(raw, offsets, strict=True):
                read_exactly(self._file, row.data, offset, self._tensor.path)
        except (OSError, StoreError) as error:
            raise StepFailedError("compute", f"{error}; run inflash verify") from error
        forget_pages(self._file)
        return rows
