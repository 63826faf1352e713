"""Choosing the next token: transformers' logits processors, in transformers' order."""

from __future__ import annotations

import secrets

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inflash._messages import Sampling
from services.compute.failures import StepFailedError


class Sampler:
    """One request's choices; the same seed gives the same choices from the same logits."""

    def __init__(self, sampling: Sampling):
        self._greedy = sampling.temperature == 0
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            self._processors.append(penalty)
        if not self._greedy:
            self._add_warpers(sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)

    def _add_warpers(self, sampling: Sampling) -> None:
        if sampling.temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(sampling.top_p))

    def choose(
        self, tokens: torch.Tensor, logits: torch.Tensor, given: int | None = None
    ) -> tuple[int, float]:
        """The next token after `tokens` int64 [count] by `logits` float32 [vocabulary], or the
        `given` one, and its log-probability before temperature, penalties and filters.

        `StepFailedError` for logits that are no numbers: any token chosen by them would be wrong.
        """
        if not logits.isfinite().all():
            raise StepFailedError(
                "compute", f"the logits after {len(tokens)} tokens are not finite: the model"
                " overflows its number format; convert a float32 or bfloat16 version of it"
            )  # fmt: skip
        if given is not None:
            return given, float(logits[given] - logits.logsumexp(0))
        scores: torch.Tensor = self._processors(tokens[None], logits[None].clone())[0]  # type: ignore[arg-type]
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))
        return token, float(logits[token] - logits.logsumexp(0))
