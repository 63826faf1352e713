"""Long prompts: how far they are, that a cancel ends them, and what the next request reuses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import inflash
from common.proof import Answer, Reference, ask
from inflash import Client
from tests.checkpoints import VOCAB
from tests.conftest import Made, serving

NEW_TOKENS = 8


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(3, VOCAB) for _ in range(count)]


def reused_by(client: Client) -> int:
    found: int = client.status()["figures"]["reused_tokens"]
    return found


def test_what_prompts_begin_with_is_reused_and_answers_stay_right(
    made: Made, run_dir: Path
) -> None:
    document = tokens(300, 1)
    prompts = [
        (document, 0),
        (document, 299),
        (document + tokens(20, 2), 300),
        (document[:250] + tokens(60, 3), 250),
    ]
    answers: list[Answer] = []
    with serving(made.store("opt"), run_dir, predictor="exact", cache="20%") as client:
        for prompt, reused in prompts:
            before = reused_by(client)
            answers.append(ask(client, prompt, NEW_TOKENS))
            assert reused_by(client) - before == reused
        whole = [*answers[-1].prompt, *answers[-1].tokens]
        list(answer := client.generate(whole, max_new_tokens=1))
        assert answer.stats is not None
        kept = len(whole) - 1  # the last token of an answer was never computed with
        assert (answer.stats.reused_tokens, answer.stats.prompt_tokens) == (kept, len(whole))
    reference = Reference(made.checkpoint("opt", "float32"), "float32")
    for answered in answers:
        proof = reference.check(answered)
        assert proof.equal, str(proof)


def test_a_long_prompt_says_how_far_it_is_and_a_cancel_ends_it(made: Made, run_dir: Path) -> None:
    prompt = tokens(400, 1)
    told: list[inflash.Prefill] = []
    slow = {"slow": "reads:100%:100ms"}  # a layer takes longer than PREFILLING_EVERY_S
    with serving(made.store("opt"), run_dir, predictor="exact", cache="30%", **slow) as client:

        def cancel(prefill: inflash.Prefill) -> None:
            told.append(prefill)
            answer.cancel()

        answer = client.generate(prompt, max_new_tokens=NEW_TOKENS, on_prefill=cancel)
        assert list(answer) == []
        assert answer.finish_reason == "cancelled"
        layers = told[0].layers
        assert (told[0].tokens_done, told[0].tokens, told[0].block) == (0, 400, 400)
        assert 0 < told[0].layers_done < layers, "in the middle of the block"
        assert told[0].share == pytest.approx(told[0].layers_done / layers)
        assert answer.prefill == told[-1]
        assert max(t.layers_done for t in told) <= told[0].layers_done + 1, "within a layer"
        again = ask(client, prompt, 1)
        assert client.status()["figures"]["reused_tokens"] == 0, "half a step is no step"
    proof = Reference(made.checkpoint("opt", "float32"), "float32").check(again)
    assert proof.equal, str(proof)
