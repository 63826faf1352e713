"""A request's steps: which tokens go through the model together, and how far a prompt is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.limits import RUNNING_MAX
from common.messages import Admit
from inflash._messages import Sampling
from services.compute.generation import Generation, limit_of, prompt_of
from services.compute.kv import Sequences
from services.compute.waits import LayerWaits

LAYERS, VOCABULARY, CONTEXT = 8, 20, 100
SEVEN = torch.nn.functional.one_hot(torch.tensor(7), VOCABULARY).float()


def generation(prompt: int, reused: int = 0, **sampling: object) -> Generation:
    ids = np.arange(prompt, dtype="<i4").tobytes()
    admit = Admit(5, Sampling(**sampling), False, ids)  # type: ignore[arg-type]
    sequences = Sequences(LAYERS, CONTEXT, 10 * CONTEXT)
    sequence = sequences.begin(prompt_of(admit), prompt + limit_of(admit, CONTEXT))
    assert sequence is not None
    sequence.hold(prompt_of(admit)[:reused], 0)
    return Generation(admit, sequence, frozenset({9}), CONTEXT)


def steps_of(made: Generation, block: int) -> list[tuple[int, list[int]]]:
    """Its steps until it ends, position and tokens; always 7 comes next."""
    steps = []
    while not made.reason:
        tokens, position = made.next(block)
        steps.append((position, tokens.tolist()))
        made.went(tokens, position, [])
        if not made.left:
            assert made.choose(SEVEN).token_id == 7
    return steps


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
    made = generation(prompt, reused, max_new_tokens=3)
    assert steps_of(made, 4) == [*expected, (prompt, [7]), (prompt + 1, [7])]
    assert made.reason == "length"
    stats = made.stats()
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (prompt, reused, 3)


def test_an_answer_ends_with_the_end_token_or_with_the_context() -> None:
    made = generation(4, max_new_tokens=50, forced=(7, 9))
    made.went(*made.next(100), [])
    made.choose(SEVEN)
    made.went(*made.next(100), [])
    assert made.choose(SEVEN).token_id == 9
    assert made.reason == "stop"
    made = generation(CONTEXT - 2, max_new_tokens=50)
    assert len(steps_of(made, CONTEXT)) == 2
    assert made.reason == "length"


def test_how_far_a_prompt_is_and_when_it_will_be_done() -> None:
    made = generation(99, reused=19, max_new_tokens=1)
    began = made.started
    made.next(40)  # nothing is done yet, but layers of the first block
    told = made.progress(2, LAYERS, began + 1.0)
    assert (told.request, told.tokens_done, told.tokens) == (5, 19, 99)
    assert (told.block, told.layers_done, told.layers) == (40, 2, LAYERS)
    assert told.eta_s == pytest.approx(7.0), "an eighth of 80 tokens is done: 10 of them"
    made.went(*made.next(40), [])
    made.next(40)
    told = made.progress(LAYERS, LAYERS, began + 8.0)
    assert (told.tokens_done, told.block) == (59, 40)
    assert told.eta_s == pytest.approx(0.0)


@pytest.mark.parametrize("rows", range(1, RUNNING_MAX + 1))
def test_what_requests_share_adds_up(rows: int) -> None:
    """Counts are divided, and nothing is lost; each waited as long as the step took."""
    waits = LayerWaits(rows, 0, hits=13, misses=5, bytes_read=4096 * 7, flash_ns=100)
    shares = [waits.share(row, rows) for row in range(rows)]
    for name in ("hits", "misses", "bytes_read"):
        parts = [getattr(share, name) for share in shares]
        assert sum(parts) == getattr(waits, name)
        assert max(parts) - min(parts) <= 1
    assert {share.flash_ns for share in shares} == {100}


def test_time_for_others_counts_in_the_answer_from_its_first_token() -> None:
    made = generation(3, max_new_tokens=3)
    for others_ns in (5_000, 7_000, 10_000):
        made.went(*made.next(10), [LayerWaits(1, 0, flash_ns=1_000)])
        made.choose(SEVEN)
        made.spent(100, others_ns)
    stats = made.stats()
    assert stats.decode_others_s == pytest.approx(5e-6)
    assert stats.decode_compute_s == pytest.approx(2e-7)
    assert (stats.stall_s, stats.decode_flash_stall_s) == (pytest.approx(3e-6), pytest.approx(2e-6))
