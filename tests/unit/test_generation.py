"""A request's steps: which tokens go through the model together, and how far a prompt is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.messages import Admit
from inflash._messages import Sampling
from services.compute.generation import Generation
from services.compute.waits import LayerWaits

LAYERS, VOCABULARY = 8, 20


def generation(
    prompt: int, block: int, reused: int, new: int = 1
) -> tuple[Generation, list[tuple[int, list[int]]]]:
    """A generation, and the steps that it makes: position and tokens. Always 7 comes next."""
    steps: list[tuple[int, list[int]]] = []

    def step(tokens: torch.Tensor, position: int) -> tuple[torch.Tensor, list[LayerWaits]]:
        steps.append((position, tokens.tolist()))
        return torch.nn.functional.one_hot(torch.tensor(7), VOCABULARY).float(), []

    ids = np.arange(prompt, dtype="<i4").tobytes()
    admit = Admit(5, Sampling(max_new_tokens=new), False, ids)
    return Generation(admit, step, frozenset(), 100, block, reused), steps


@pytest.mark.parametrize(
    ("prompt", "reused", "expected"),
    [
        (10, 0, [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9])]),
        (10, 3, [(3, [3, 4, 5, 6]), (7, [7, 8, 9])]),
        (10, 9, [(9, [9])]),
        (4, 0, [(0, [0, 1, 2, 3])]),
    ],
)
def test_a_prompt_goes_in_blocks_without_what_is_reused(prompt, reused, expected) -> None:
    made, steps = generation(prompt, 4, reused, new=3)
    assert [choice.token_id for choice in made.tokens()] == [7, 7, 7]
    assert steps == [*expected, (prompt, [7]), (prompt + 1, [7])]
    stats = made.stats()
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (prompt, reused, 3)


def test_how_far_a_prompt_is_and_when_it_will_be_done() -> None:
    made, _ = generation(prompt=100, block=40, reused=20)
    began = made.started
    made.prefilled = 20  # nothing is done yet, but layers of the first block
    told = made.progress(2, LAYERS, began + 1.0)
    assert (told.request, told.tokens_done, told.tokens) == (5, 20, 100)
    assert (told.block, told.layers_done, told.layers) == (40, 2, LAYERS)
    assert told.eta_s == pytest.approx(7.0), "an eighth of 80 tokens is done: 10 of them"
    made.prefilled = 60
    told = made.progress(LAYERS, LAYERS, began + 8.0)
    assert (told.tokens_done, told.block) == (60, 40)
    assert told.eta_s == pytest.approx(0.0)
