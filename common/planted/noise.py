"""Random numbers for weights: fast, and the same on every machine. torch for the blocks.

Bulk noise is odd bytes, scaled to unit variance: a hundred times faster than normal numbers, and no
sum over hundreds of them tells the difference. Every tensor has its own generator, seeded by the
checkpoint's seed and the tensor's name, so the order in which tensors are made means nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch

BLOCK_VALUES = 1 << 24  # made at once: 64 MiB as float32
# Odd numbers from -127 to 127: no mean, all bytes equally likely to be one of them.
_BYTE_STD = math.sqrt((128**2 - 1) / 3)


def bits(seed: int, name: str) -> np.random.SFC64:
    """The generator of the tensor `name`."""
    return np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),)))


def noise_blocks(
    seed: int, name: str, rows: int, columns: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Noise of mean 0 and variance 1: rows, and float32 [these rows, columns], from first to last.

    A block may be changed, and is valid until the next is asked for.
    """
    source = bits(seed, name)
    count = max(1, min(rows, BLOCK_VALUES // columns))
    block = torch.empty(count, columns)
    for first in range(0, rows, count):
        some = block[: min(count, rows - first)]
        raw = source.random_raw(-(-some.numel() // 8)).view(np.int8)
        raw |= 1
        some.copy_(torch.from_numpy(raw[: some.numel()]).view(some.shape)).mul_(1 / _BYTE_STD)
        yield slice(first, first + len(some)), some


def normal(seed: int, name: str, *shape: int) -> torch.Tensor:
    """Normal numbers, float32; for small tensors."""
    values = np.random.Generator(bits(seed, name)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def signs(seed: int, name: str, *shape: int) -> torch.Tensor:
    """-1 or 1 with equal chances, float32."""
    coins = np.random.Generator(bits(seed, name)).integers(0, 2, shape, dtype=np.int8)
    return torch.from_numpy(coins).float().mul_(2).sub_(1)


def token_ids(seed: int, name: str, vocabulary: int, *shape: int) -> torch.Tensor:
    """Ids, all equally likely, int64: the text that planted models are measured on."""
    ids = np.random.Generator(bits(seed, name)).integers(0, vocabulary, shape, dtype=np.int64)
    return torch.from_numpy(ids)
