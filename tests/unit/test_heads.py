"""Attention of one query of each of a few sequences, against torch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.heads import Held, attend_job, weigh
from services.compute.attention import Do, do_alone
from services.compute.products import Products

ROOM = 40


def sequence(dtype: str, kv_heads: int, width: int) -> torch.Tensor:
    """Keys and values in a larger room, [2, kv heads, room, width]."""
    return torch.randn(2, kv_heads, ROOM, width).to(getattr(torch, dtype))


def attended(
    queries: torch.Tensor, states: Sequence[torch.Tensor], lengths: Sequence[int],
    do: Do = do_alone,
) -> torch.Tensor:  # fmt: skip
    keys, values = zip(*states, strict=True)
    held = [
        Held(key.data_ptr(), value.data_ptr(), ROOM, tokens)
        for key, value, tokens in zip(keys, values, lengths, strict=True)
    ]
    out, name = torch.full(queries.shape, torch.nan), str(keys[0].dtype).removeprefix("torch.")
    do(attend_job(queries.numpy(), held, len(keys[0]), name, out.numpy()), 1 << 30)
    return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("width", [16, 20])
def test_it_is_torchs(dtype: str, heads: int, kv_heads: int, width: int) -> None:
    torch.manual_seed(0)
    lengths = (1, 3, 4, 5, ROOM)
    states = [sequence(dtype, kv_heads, width) for _ in lengths]
    queries = 3 * torch.randn(len(lengths), heads, width)
    found = attended(queries, states, lengths)
    for query, (keys, values), n, out in zip(queries, states, lengths, found, strict=True):
        expected = F.scaled_dot_product_attention(
            query[None, :, None], keys[None, :, :n].float(), values[None, :, :n].float(),
            scale=1.0, enable_gqa=True,
        )[0, :, 0]  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_among_others_comes_to_the_same_bits_by_any_thread() -> None:
    torch.manual_seed(1)
    states, lengths = [sequence("float16", 6, 16) for _ in range(3)], (7, ROOM, 22)
    queries = torch.randn(3, 6, 16)
    together = attended(queries, states, lengths)
    for i in range(3):
        some = slice(i, i + 1)
        assert torch.equal(attended(queries[some], states[some], lengths[some])[0], together[i])
    assert torch.equal(attended(queries, states, lengths, Products(3).do), together)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 300.0])
def test_weights_are_those_of_softmax(spread: float) -> None:
    scores = (spread * torch.randn(1000, generator=torch.Generator().manual_seed(2))).numpy()
    expected = torch.softmax(torch.from_numpy(scores).double(), 0).numpy()
    weights = scores.copy()
    weights *= weigh(weights)
    np.testing.assert_allclose(weights, expected, rtol=2e-5, atol=1e-30)
    assert abs(weights.sum() - 1) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    scores = np.ones(9, np.float32)
    scores[4] = bad
    by = weigh(scores)
    assert np.isnan(scores * by).any()
