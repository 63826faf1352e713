"""The sampler against transformers' own generate-time behaviour, at its edges."""

from __future__ import annotations

import pytest
import torch

from inflash._messages import Sampling
from services.compute.sampling import Sampler

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 1.0])
TOKENS = torch.tensor([1, 1, 3])


def choices(sampling: Sampling, count: int = 200) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(TOKENS, LOGITS)[0] for _ in range(count)]


def test_greedy_takes_the_top_token_and_tells_its_logprob() -> None:
    token, logprob = Sampler(Sampling()).choose(TOKENS, LOGITS)
    assert token == 1
    assert logprob == pytest.approx(float(LOGITS.log_softmax(0)[1]), abs=1e-6)


def test_penalty_turns_greedy_away_from_what_was_said() -> None:
    assert Sampler(Sampling(repetition_penalty=1.5)).choose(TOKENS, LOGITS)[0] == 2


def test_same_seed_same_choices_other_seed_others() -> None:
    first = choices(Sampling(temperature=1.0, seed=1))
    assert first == choices(Sampling(temperature=1.0, seed=1))
    assert first != choices(Sampling(temperature=1.0, seed=2))
    assert len(set(first)) > 2


def test_top_k_and_top_p_leave_only_the_top() -> None:
    assert set(choices(Sampling(temperature=1.0, top_k=2, seed=0))) == {1, 2}
    assert set(choices(Sampling(temperature=1.0, top_p=0.1, seed=0))) == {1}


def test_choosing_does_not_change_the_logits() -> None:
    before = LOGITS.clone()
    choices(Sampling(temperature=0.3, top_k=2, repetition_penalty=2.0, seed=0), 3)
    assert torch.equal(LOGITS, before)
