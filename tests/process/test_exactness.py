"""The answers of the services equal transformers' own, for every family variant and cache size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from common.proof import Answer, Reference, ask
from tests.checkpoints import VARIANTS, VOCAB
from tests.conftest import Made, serving

PROMPT_TOKENS = (1, 7, 300)
NEW_TOKENS = 64
# Predictor, cache, and how many tokens to answer to each prompt. Through the three slots of the
# smallest cache a token takes hundreds of parts, so that its answers are fewer here.
ALL_PROMPTS = dict.fromkeys(PROMPT_TOKENS, NEW_TOKENS)
WAYS = [("exact", "2%", {1: 4, 7: 24, 300: 4}), ("all", "30%", ALL_PROMPTS)]
MORE_WAYS = [("all", "2%", {7: 24}), ("exact", "100%", ALL_PROMPTS)]
MAIN = ("opt", "opt-postln", "llama-gqa", "llama-fatrelu")
MOST = ("llama-gqa",)


def prompts(lengths: Sequence[int] = PROMPT_TOKENS) -> list[list[int]]:
    torch.manual_seed(5)
    return [torch.randint(3, VOCAB, (count,)).tolist() for count in lengths]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_the_reference(made: Made, run_dir: Path, variant: str) -> None:
    store = made.store(variant)
    answers: list[tuple[str, Answer]] = []
    # A variant differs from its family's others in its weights, not in how they are read.
    ways = WAYS if variant in MAIN else WAYS[:1]
    for predictor, cache, counts in ways + (MORE_WAYS if variant in MOST else []):
        with serving(store, run_dir, predictor=predictor, cache=cache) as client:
            for prompt in prompts(tuple(counts)):
                answer = ask(client, prompt, counts[len(prompt)])
                answers.append((f"{predictor} {cache}", answer))
    reference = Reference(made.checkpoint(variant, "float32"), "float32")
    for way, answer in answers:
        proof = reference.check(answer)
        assert proof.equal, f"{way}: {proof}"
    assert len({token for _, answer in answers for token in answer.tokens}) > 2, "a dull model"


@pytest.mark.parametrize(
    ("variant", "dtype"), list(zip(MAIN, ["float16", "bfloat16"] * 2, strict=True))
)
def test_half_precision_is_close(made: Made, run_dir: Path, variant: str, dtype: str) -> None:
    with serving(made.store(variant, dtype), run_dir, predictor="exact", cache="10%") as client:
        answers = [ask(client, prompt, NEW_TOKENS) for prompt in prompts()]
    reference = Reference(made.checkpoint(variant, dtype), dtype)
    for answer in answers:
        proof = reference.check(answer)
        assert proof.equal, str(proof)


if os.environ.get("EXACTNESS") == "full":  # 198 servers: an hour

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("cache", ["2%", "30%", "100%"])
    @pytest.mark.parametrize("predictor", ["all", "exact"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_combination(
        made: Made, run_dir: Path, variant: str, dtype: str, predictor: str, cache: str
    ) -> None:
        with serving(
            made.store(variant, dtype), run_dir, predictor=predictor, cache=cache
        ) as client:
            answers = [ask(client, prompt, NEW_TOKENS) for prompt in prompts()]
        reference = Reference(made.checkpoint(variant, dtype), dtype)
        for answer in answers:
            proof = reference.check(answer)
            assert proof.equal, str(proof)
