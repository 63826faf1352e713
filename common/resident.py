"""Which resident tensors a server packs (setting `resident`), which may stay on flash (setting
`embedding`), and the bytes that they take.

Matrices that a token is multiplied with are packed: attention, projections around the layers, the
head. Embeddings, of which a token takes a row, norms and biases stay as they are. Where the others
become int4, the head and the projections to values become int8, as in llama.cpp's mixed formats:
int4 values alone cost the demo model 1.9 % of perplexity (docs/measurements.md). A tied head gets
rows of its own, for the embedding stays as it is.

Of the tokens' embedding a token takes one row, which can be read when the token comes: it need not
be in memory, unless it is the head as well, which every token multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from common.errors import SettingError
from common.store.geometry import DTYPE_BYTES, pack_problem, row_bytes
from common.store.tensors import Tensor

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"  # in every family, behind the path of its module
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


def embedding_of(names: Iterable[str]) -> str:
    """The tokens' embedding, of a model's resident tensors."""
    return next(name for name in names if name.endswith(EMBEDDING))


def spare_embedding_bytes(sizes: Mapping[str, int], resident: str) -> int:
    """Of resident tensors, by name and bytes: those of the embedding if it can stay on flash, or 0
    where it is the head as well."""
    if HEAD not in sizes and resident == "float":
        return 0
    return sizes[embedding_of(sizes)]


def resident_bytes(tensors: Mapping[str, Tensor], resident: str, compute_dtype: str) -> int:
    """Bytes in memory of a store's resident tensors."""
    total = 0
    if HEAD not in tensors and resident != "float":
        tied = tensors[embedding_of(tensors)].shape
        total += _packed_bytes(tied, packed_as(HEAD, tied, resident))
    for name, tensor in tensors.items():
        if number_format := packed_as(name, tensor.shape, resident):
            total += _packed_bytes(tensor.shape, number_format)
        else:
            total += tensor.nbytes * DTYPE_BYTES[compute_dtype] // DTYPE_BYTES[tensor.dtype]
    return total


def _packed_bytes(shape: tuple[int, ...], number_format: str) -> int:
    return shape[0] * row_bytes(number_format, shape[1])
