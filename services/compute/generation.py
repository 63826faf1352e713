"""One request from prompt to last token: prefill in blocks, then a step a token. Pure but for the
clock: it says which tokens come next, and takes what came of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from common.messages import Admit, Prefilling
from inflash._messages import Stats
from services.compute.kv import Sequence
from services.compute.sampling import Sampler
from services.compute.waits import LayerWaits


def prompt_of(admit: Admit) -> torch.Tensor:
    """The prompt's token ids, int64 [tokens]."""
    return torch.frombuffer(bytearray(admit.prompt), dtype=torch.int32).long()


def limit_of(admit: Admit, context: int) -> int:
    """Tokens that its answer may have."""
    return min(admit.sampling.max_new_tokens, context - len(admit.prompt) // 4)


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

    def add(self, waits: Many[LayerWaits]) -> None:
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


class Generation:
    """A request that runs. `reason` says why it ended, "" while it goes on."""

    def __init__(self, admit: Admit, sequence: Sequence, end_ids: frozenset[int], context: int):
        """`sequence` has its keys and values, perhaps already of what its prompt begins with."""
        self.admit, self.sequence = admit, sequence
        self.reused = sequence.count  # of the prompt's tokens, those whose states were kept
        self.aborted = False
        self.reason = ""
        self.over = False  # its client knows that it is
        self.anew = False  # a block of its prompt began anew
        self.new_tokens = 0
        self.block = 0  # tokens of the prompt in the step that runs, or ran last
        self.last_step = 0  # its number
        self.told = self.started = time.monotonic()
        self._end_ids = end_ids
        prompt = prompt_of(admit)
        self._prompt, self._limit = len(prompt), limit_of(admit, context)
        self._tokens = torch.empty(self._prompt + self._limit, dtype=torch.int64)
        self._tokens[: self._prompt] = prompt
        self._sampler = Sampler(admit.sampling)
        self._total, self._decode = Tally(), Tally()
        self._others_ns = self._others_before_ns = 0
        self._first_token = self._last_token = 0.0

    @property
    def request(self) -> int:
        return self.admit.request

    @property
    def left(self) -> int:
        """Tokens of its prompt that have to go through the model before there is one of its
        answer."""
        return max(self._prompt - self.sequence.count, 0)

    def next(self, most: int) -> tuple[torch.Tensor, int]:
        """What goes through the model next: token ids int64 [tokens], at most `most` of the prompt,
        and the position of the first."""
        first = self.sequence.count
        self.block = min(self.left, most) or 1
        return self._tokens[first : first + self.block], first

    def went(self, tokens: torch.Tensor, position: int, waits: Many[LayerWaits]) -> None:
        """They went through it; `waits` are this request's."""
        self.sequence.hold(tokens, position)
        self._total.add(waits)
        if self.new_tokens:
            self._decode.add(waits)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, by the logits after the last one, float32 [vocabulary]. The end token, if
        it comes, is the answer's last. Raises StepFailedError."""
        end, forced = self._prompt + self.new_tokens, self.admit.sampling.forced
        given = forced[self.new_tokens] if self.new_tokens < len(forced) else None
        token, logprob = self._sampler.choose(self._tokens[:end], logits, given)
        self._tokens[end] = token
        self.new_tokens, self._last_token = self.new_tokens + 1, time.monotonic()
        if self.new_tokens == 1:
            self._first_token = self._last_token
        if token in self._end_ids and not self.admit.sampling.ignore_eos:
            self.reason = "stop"
        elif self.new_tokens == self._limit:
            self.reason = "length"
        return Choice(token, logprob, logits)

    def spent(self, sampling_ns: int, others_ns: int) -> None:
        """What choosing the last token took, and what passed for others since the request began."""
        self._total.compute_ns += sampling_ns
        self._others_ns = others_ns
        if self.new_tokens > 1:
            self._decode.compute_ns += sampling_ns
        else:
            self._others_before_ns = others_ns

    def progress(self, layers_done: int, layers: int, now: float) -> Prefilling:
        """How far the prompt is, so many layers into a block."""
        prefilled = self.sequence.count
        done = (prefilled - self.reused) * layers + self.block * layers_done
        left = (self._prompt - self.reused) * layers - done
        eta_s = (now - self.started) * left / done
        return Prefilling(
            self.request, prefilled, self._prompt, self.block, layers_done, layers, eta_s
        )

    def stats(self) -> Stats:
        """The request's figures so far; the gateway knows the waiting before compute had it."""
        first, total, decode = self._first_token or time.monotonic(), self._total, self._decode
        return Stats(
            prompt_tokens=self._prompt,
            reused_tokens=self.reused,
            new_tokens=self.new_tokens,
            queue_s=0.0,
            time_to_first_token_s=first - self.started,
            decode_s=max(self._last_token - first, 0.0),
            bytes_read=total.bytes_read,
            reads=total.reads,
            hits=total.hits,
            misses=total.misses,
            stall_s=total.stall_ns / 1e9,
            decode_bytes_read=decode.bytes_read,
            decode_hits=decode.hits,
            decode_misses=decode.misses,
            decode_fired=decode.fired,
            decode_late_fired=decode.late_fired,
            decode_prefetched=decode.prefetched,
            decode_wasted_bytes=decode.wasted_bytes,
            decode_read_s=decode.read_ns / 1e9,
            decode_stall_s=decode.stall_ns / 1e9,
            decode_flash_stall_s=decode.flash_ns / 1e9,
            decode_predictor_stall_s=decode.predictor_ns / 1e9,
            decode_queue_stall_s=decode.queue_ns / 1e9,
            decode_others_s=(self._others_ns - self._others_before_ns) / 1e9,
            compute_s=total.compute_ns / 1e9,
            decode_compute_s=decode.compute_ns / 1e9,
        )
