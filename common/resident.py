"""Which resident tensors a server packs (setting `resident`), and the bytes that they then take.

Matrices that a token is multiplied with are packed: attention, projections around the layers, the
head. Embeddings, of which a token takes a row, norms and biases stay as they are. Where the others
become int4, the head and the projections to values become int8, as in llama.cpp's mixed formats:
int4 values alone cost the demo model 1.9 % of perplexity (docs/measurements.md). A tied head gets
rows of its own, for the embedding stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import SettingError
from common.store.geometry import DTYPE_BYTES, pack_problem, row_bytes
from common.store.tensors import Tensor

HEAD = "lm_head.weight"
VALUES = "v_proj.weight"


def packed_as(name: str, shape: tuple[int, ...], resident: str) -> str:
    """The number format that the tensor `name` is packed as; "" if it stays as it is.

    `SettingError` for a matrix whose rows cannot be packed so.
    """
    if resident == "float" or len(shape) != 2 or "embed" in name:
        return ""
    number_format = "int8" if name == HEAD or name.endswith(VALUES) else resident
    if problem := pack_problem(number_format, shape[1]):
        raise SettingError(f"INFLASH_RESIDENT: {name}: {problem}; choose another format, or float")
    return number_format


def resident_bytes(
    tensors: Mapping[str, Tensor], resident: str, compute_dtype: str, tied: str
) -> int:
    """Bytes in memory of a store's resident tensors.

    `tied` names the tensor that is the head, too; "" where the head is one of its own.
    """
    matrices = {name: tensor.shape for name, tensor in tensors.items()}
    total = 0
    if tied and resident != "float":
        total += _packed_bytes(matrices[tied], packed_as(HEAD, matrices[tied], resident))
    for name, tensor in tensors.items():
        if number_format := packed_as(name, tensor.shape, resident):
            total += _packed_bytes(tensor.shape, number_format)
        else:
            total += tensor.nbytes * DTYPE_BYTES[compute_dtype] // DTYPE_BYTES[tensor.dtype]
    return total


def _packed_bytes(shape: tuple[int, ...], number_format: str) -> int:
    return shape[0] * row_bytes(number_format, shape[1])
