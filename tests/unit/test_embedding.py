"""The embedding on flash: the rows that the file has, and a clear end where it has them no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.store.tensors import read_header
from services.compute.embedding import FlashEmbedding
from services.compute.failures import StepFailedError

ROWS, WIDTH, NAME = 50, 24, "model.embed_tokens.weight"


def written(folder: Path, dtype: torch.dtype) -> tuple[Path, torch.Tensor]:
    """A file in which the embedding begins at no round byte."""
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.float16), NAME: table}, path)
    return path, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    path, table = written(tmp_path, dtype)
    embedding = FlashEmbedding(read_header(path)[NAME], torch.float32)
    for ids in ([[7]], [[0, ROWS - 1, 7, 7, 0, 3]]):
        rows = embedding(torch.tensor(ids, dtype=torch.int32))
        assert rows.dtype == torch.float32
        assert torch.equal(rows, table[torch.tensor(ids)].float())


def test_a_file_that_was_cut_fails_the_step(tmp_path: Path) -> None:
    path, table = written(tmp_path, torch.float16)
    embedding = FlashEmbedding(read_header(path)[NAME], torch.float16)
    os.truncate(path, path.stat().st_size - WIDTH)
    with pytest.raises(
        StepFailedError, match=r"model\.safetensors is truncated.*verify"
    ) as failure:
        embedding(torch.tensor([[1, ROWS - 1]]))
    assert failure.value.service == "compute"
    assert torch.equal(embedding(torch.tensor([[1]]))[0, 0], table[1])
