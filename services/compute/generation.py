"""One request from prompt to last token: prefill in blocks, then a step a token. No sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from common.messages import Admit, Prefilling
from inflash._messages import Stats
from services.compute.sampling import Sampler
from services.compute.waits import LayerWaits

Step = Callable[[torch.Tensor, int], tuple[torch.Tensor, list[LayerWaits]]]
"""Runs the model over tokens int64 [count] that stand from a position on: the logits after the last
one, float32 [vocabulary], and what each layer waited for."""


def prompt_of(admit: Admit) -> torch.Tensor:
    """The prompt's token ids, int64 [tokens]."""
    return torch.frombuffer(bytearray(admit.prompt), dtype=torch.int32).long()


@dataclass
class Tally:
    """What the steps of a request, or of its decode part, add up to."""

    bytes_read: int = 0
    reads: int = 0
    hits: int = 0
    misses: int = 0
    fired: int = 0
    late_fired: int = 0
    prefetched: int = 0
    wasted_bytes: int = 0
    read_ns: int = 0
    stall_ns: int = 0
    flash_ns: int = 0
    predictor_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0

    def add(self, waits: list[LayerWaits]) -> None:
        for layer in waits:
            self.bytes_read += layer.bytes_read
            self.reads += layer.reads
            self.hits += layer.hits
            self.misses += layer.misses
            self.fired += layer.fired
            self.late_fired += layer.late_fired
            self.prefetched += layer.prefetched
            self.wasted_bytes += layer.wasted_bytes
            self.read_ns += layer.read_ns
            self.stall_ns += layer.stall_ns
            self.flash_ns += layer.flash_ns
            self.predictor_ns += layer.predictor_ns
            self.queue_ns += layer.queue_ns
            self.compute_ns += layer.compute_ns


@dataclass(frozen=True)
class Choice:
    token_id: int
    logprob: float
    logits: torch.Tensor  # float32 [vocabulary]


@dataclass
class Generation:
    """Iterates over the tokens of `admit`; `reason` says why it ended."""

    admit: Admit
    step: Step
    end_ids: frozenset[int]
    context: int  # tokens
    block: int  # tokens of a prompt in one step
    reused: int = 0  # of the prompt's tokens, those whose keys and values are kept
    reason: str = "length"
    new_tokens: int = 0
    prefilled: int = 0  # of the prompt's tokens, those that are in the KV cache
    total: Tally = field(default_factory=Tally)
    decode: Tally = field(default_factory=Tally)
    started: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    last_token: float = 0.0

    def tokens(self) -> Iterator[Choice]:
        """The tokens, each as soon as it is chosen; the end token, if it comes, is the last."""
        prompt = prompt_of(self.admit)
        limit = min(self.admit.sampling.max_new_tokens, self.context - len(prompt))
        sequence = torch.empty(len(prompt) + limit, dtype=torch.int64)
        sequence[: len(prompt)] = prompt
        sampler = Sampler(self.admit.sampling)
        logits = self._prefill(prompt)
        forced = self.admit.sampling.forced
        for count in range(1, limit + 1):
            end = len(prompt) + count - 1
            given = forced[count - 1] if count <= len(forced) else None
            began_ns = time.monotonic_ns()
            token, logprob = sampler.choose(sequence[:end], logits, given)
            self._add_compute(count, time.monotonic_ns() - began_ns)
            sequence[end] = token
            self._mark(count)
            yield Choice(token, logprob, logits)
            if token in self.end_ids and not self.admit.sampling.ignore_eos:
                self.reason = "stop"
                return
            if count < limit:
                logits = self._decode(sequence[end : end + 1], end)

    def _add_compute(self, count: int, ns: int) -> None:
        self.total.compute_ns += ns
        self.decode.compute_ns += ns if count > 1 else 0

    def _mark(self, count: int) -> None:
        self.new_tokens, self.last_token = count, time.monotonic()
        if count == 1:
            self.first_token = self.last_token

    def _prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(0)
        for start in range(self.reused, len(prompt), self.block):
            self.prefilled = start
            logits, waits = self.step(prompt[start : start + self.block], start)
            self.total.add(waits)
        return logits

    def progress(self, layers_done: int, layers: int, now: float) -> Prefilling:
        """How far the prompt is, so many layers into a block."""
        tokens = len(self.admit.prompt) // 4
        block = min(self.block, tokens - self.prefilled)
        done = (self.prefilled - self.reused) * layers + block * layers_done
        left = (tokens - self.reused) * layers - done
        eta_s = (now - self.started) * left / done
        return Prefilling(
            self.admit.request, self.prefilled, tokens, block, layers_done, layers, eta_s
        )

    def _decode(self, token: torch.Tensor, position: int) -> torch.Tensor:
        logits, waits = self.step(token, position)
        self.total.add(waits)
        self.decode.add(waits)
        return logits

    def stats(self) -> Stats:
        """The request's figures so far; the gateway knows the waiting before compute had it."""
        first = self.first_token or time.monotonic()
        return Stats(
            prompt_tokens=len(self.admit.prompt) // 4,
            reused_tokens=self.reused,
            new_tokens=self.new_tokens,
            queue_s=0.0,
            time_to_first_token_s=first - self.started,
            decode_s=max(self.last_token - first, 0.0),
            bytes_read=self.total.bytes_read,
            reads=self.total.reads,
            hits=self.total.hits,
            misses=self.total.misses,
            stall_s=self.total.stall_ns / 1e9,
            decode_bytes_read=self.decode.bytes_read,
            decode_hits=self.decode.hits,
            decode_misses=self.decode.misses,
            decode_fired=self.decode.fired,
            decode_late_fired=self.decode.late_fired,
            decode_prefetched=self.decode.prefetched,
            decode_wasted_bytes=self.decode.wasted_bytes,
            decode_read_s=self.decode.read_ns / 1e9,
            decode_stall_s=self.decode.stall_ns / 1e9,
            decode_flash_stall_s=self.decode.flash_ns / 1e9,
            decode_predictor_stall_s=self.decode.predictor_ns / 1e9,
            decode_queue_stall_s=self.decode.queue_ns / 1e9,
            compute_s=self.total.compute_ns / 1e9,
            decode_compute_s=self.decode.compute_ns / 1e9,
        )
