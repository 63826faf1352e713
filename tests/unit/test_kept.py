"""What the KV cache keeps for the next request: as many tokens as both prompts begin with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.compute.attention import ATTENTION
from services.compute.kv import Kept

LAYERS, CONTEXT = 3, 40
FIRST = [5, 6, 7, 8, 9, 10, 11, 12]


def tokens(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        (FIRST, 7),  # the logits after its last token are wanted
        ([*FIRST, 13, 14], 8),
        ([5, 6, 7, 1, 9, 10], 3),
        ([5, 6, 7], 2),
        ([1, *FIRST], 0),
        ([5], 0),
        ([], 0),
    ],
)
def test_the_common_beginning_is_kept(prompt: list[int], reused: int) -> None:
    kept = Kept(LAYERS, CONTEXT)
    assert kept.begin(tokens(FIRST)) == 0
    kept.hold(tokens(FIRST), 0)
    assert kept.begin(tokens(prompt)) == reused
    assert kept.begin(tokens([*FIRST, 1])) == reused, "what differed is gone"


def test_generated_tokens_are_kept_too() -> None:
    kept = Kept(LAYERS, CONTEXT)
    kept.hold(tokens(FIRST[:5]), 0)
    kept.hold(tokens([20]), 5)
    assert kept.begin(tokens([*FIRST[:5], 20, 21])) == 6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.2)
    made.set_attn_implementation(ATTENTION)
    return made


def run(model: Any, kept: Kept, ids: list[int], position: int) -> torch.Tensor:
    positions = torch.arange(position, position + len(ids))[None]
    with torch.inference_mode():
        out = model(
            input_ids=tokens(ids)[None], position_ids=positions, past_key_values=kept.cache,
            use_cache=True,
        )  # fmt: skip
    kept.hold(tokens(ids), position)
    logits: torch.Tensor = out.logits[0, -1]
    return logits


@pytest.mark.parametrize("prompt", [FIRST, [*FIRST, 13, 14], [5, 6, 7, 1, 9, 10], [5, 6]], ids=str)
@pytest.mark.parametrize("failing", [False, True], ids=["after a step", "after half a step"])
def test_logits_equal_those_of_an_empty_cache(model: Any, prompt: list[int], failing: bool) -> None:
    kept = Kept(LAYERS, CONTEXT)
    run(model, kept, FIRST, 0)
    if failing:  # a step that is given up in its second layer: the first has its states already

        def give_up(*_: object) -> None:
            raise ZeroDivisionError

        hook = model.model.layers[1].register_forward_pre_hook(give_up)
        with pytest.raises(ZeroDivisionError):
            run(model, kept, [30, 31, 32], len(FIRST))
        hook.remove()
    reused = kept.begin(tokens(prompt))
    assert reused > 0
    found = run(model, kept, prompt[reused:], reused)
    expected = run(model, Kept(LAYERS, CONTEXT), prompt, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
