"""Our attention function and KV cache against transformers' own, in transformers' own models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.cache_utils import Cache

from services.compute.attention import ATTENTION, attend
from services.compute.kv import KVLayer, SharedLayer

CONTEXT = 64


def opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return OPTForCausalLM(config)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)],
)
@pytest.mark.parametrize("blocks", [[20], [7, 8, 5], [1] * 12], ids=["whole", "blocks", "tokens"])
def test_logits_equal_those_of_eager_attention(make, dtype, tolerance, blocks) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    tokens = torch.randint(0, 100, (1, sum(blocks)))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        model.set_attn_implementation(ATTENTION)
        model = model.to(dtype)
        kv, parts, start = Cache(layers=[KVLayer(CONTEXT) for _ in range(2)]), [], 0
        for size in blocks:
            block = tokens[:, start : start + size]
            positions = torch.arange(start, start + size)[None]
            parts.append(
                model(input_ids=block, position_ids=positions, past_key_values=kv, use_cache=True)
            )
            start += size
    found = torch.cat([part.logits for part in parts], dim=1).float()
    assert kv.get_seq_length() == sum(blocks)
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def test_kv_cache_returns_views_and_empties() -> None:
    kv = KVLayer(CONTEXT)
    states = torch.randn(1, 2, 5, 8)
    keys, _ = kv.update(states, states)
    again, _ = kv.update(states[:, :, :1], states[:, :, :1])
    assert keys.data_ptr() == again.data_ptr()
    assert again.shape == (1, 2, 6, 8)
    kv.reset()
    assert kv.get_seq_length() == 0
    fresh, _ = kv.update(states * 2, states)
    assert torch.equal(fresh, states * 2)


def test_one_query_in_half_precision_equals_many() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 1, 16)
    key, value = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    whole, _ = attend(torch.nn.Identity(), query, key, value, None)
    half, _ = attend(torch.nn.Identity(), query.half(), key.half(), value.half(), None)
    assert torch.allclose(whole, half.float(), atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_of_each_of_several_sequences_is_that_of_each_alone(dtype: torch.dtype) -> None:
    """To the bit, and the new states are in their place."""
    torch.manual_seed(0)
    lengths, alone, together = (1, 6, 40), list[KVLayer](), list[KVLayer]()
    for tokens in lengths:
        states = torch.randn(2, 1, 2, tokens, 16).to(dtype)
        for layers in (alone, together):
            layers.append(KVLayer(CONTEXT))
            layers[-1].update(*states)
    for _ in range(2):
        query = torch.randn(1, 4, 3, 16).to(dtype)
        key, value = torch.randn(2, 1, 2, 3, 16).to(dtype)
        found, _ = attend(
            torch.nn.Identity(), query, *SharedLayer(together, [1, 1, 1]).update(key, value), None
        )
        for i, layer in enumerate(alone):
            one = slice(i, i + 1)
            held = layer.update(key[:, :, one], value[:, :, one])
            expected, _ = attend(torch.nn.Identity(), query[:, :, one], *held, None)
            assert torch.equal(found[:, one], expected)
    for a, b, tokens in zip(alone, together, lengths, strict=True):
        for one, other in ((a.keys, b.keys), (a.values, b.values)):
            assert one is not None and other is not None  # noqa: PT018
            assert torch.equal(one[:, :, : tokens + 2], other[:, :, : tokens + 2])
