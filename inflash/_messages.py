"""What a client and the gateway say to each other (DEALER ⇄ ROUTER), and the values inside.

    Generate, Cancel, Status   →   Waiting, Prefilling, Token, Finished, Failed, StatusReply

Every Generate ends in exactly one of Finished and Failed. `request` is the client's own number
for its request: any integer that it is not using for another one. A Cancel of a request that is
over, or never was, is silently ignored: it may have crossed the end on its way.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from inflash._wire import Codec, Raw

CLIENT_MESSAGE_BYTES_MAX = 8 << 20
"""Largest message on the client link: a prompt of a million token ids fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy. Raises `ValueError` out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy: the top token, no randomness
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: a fresh one for each request
    stop: tuple[str, ...] = ()  # text that ends the answer; it is not part of it
    ignore_eos: bool = False  # go on after the model's end token: for measuring
    forced: tuple[int, ...] = ()  # the answer's first token ids, not chosen but given: to measure

    def __post_init__(self) -> None:
        bounds = [
            ("max_new_tokens", 1 <= self.max_new_tokens <= 2**31, "at least 1"),
            # Not between: a quotient that overflows is no distribution any more.
            ("temperature", _zero_or_fair(self.temperature), "0 (greedy), or from 0.01 to 100"),
            ("top_k", 0 <= self.top_k <= 2**31, "0 (all) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "from 0.01 to 100"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("stop", all(0 < len(s) <= 256 for s in self.stop), "1 to 256 characters each"),
            ("stop", len(self.stop) <= 16, "at most 16 texts"),
            ("forced", all(0 <= t < 2**31 for t in self.forced), "token ids"),
        ]
        for name, holds, rule in bounds:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r:.60}: it must be {rule}")


def _zero_or_fair(temperature: float) -> bool:
    return temperature == 0.0 or 0.01 <= temperature <= 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where a request's time and bytes went.

    Seconds are wall time. A stall is time in which compute waited for a neuron. Bytes and reads
    are those made from flash for this request.

    Of a step that it shared with other requests its times are whole, for it waited so long; bytes,
    reads and neurons are divided equally among the requests of the step.
    """

    prompt_tokens: int
    reused_tokens: int  # of the prompt: computed for a request before, and kept
    new_tokens: int
    queue_s: float
    time_to_first_token_s: float
    decode_s: float
    bytes_read: int
    reads: int
    hits: int
    misses: int
    stall_s: float
    decode_bytes_read: int
    decode_hits: int
    decode_misses: int  # named neurons that were neither cached nor prefetched in time
    decode_fired: int  # neurons that were needed: those that fired
    decode_late_fired: int  # late neurons: needed and, when their layer came, not there
    decode_prefetched: int  # hits that look-ahead brought for the token that needed them
    decode_wasted_bytes: int  # prefetched for a layer that then did not need them
    decode_read_s: float  # time in which reads were in flight
    decode_stall_s: float
    decode_flash_stall_s: float  # of that, waiting for reads
    decode_predictor_stall_s: float  # of that, until the neurons were named
    decode_queue_stall_s: float  # of that, while messages lay between two processes
    decode_others_s: float  # while blocks of other requests' prompts were computed
    compute_s: float  # products of matrices, and choosing tokens
    decode_compute_s: float

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first, by the time that they took; 0 if there is none."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the asked-for neurons, prefill included, that were in the cache already."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    @property
    def decode_hit_rate(self) -> float:
        """The same without prefill."""
        asked = self.decode_hits + self.decode_misses
        return self.decode_hits / asked if asked else 1.0

    @property
    def decode_bytes_per_token(self) -> float:
        """Bytes read from flash for each token after the first; 0 if there is none."""
        return self.decode_bytes_read / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def decode_late_share(self) -> float:
        """Share of the neurons that fired, without prefill, for which compute had to wait."""
        return self.decode_late_fired / self.decode_fired if self.decode_fired else 0.0

    @property
    def decode_hidden_share(self) -> float:
        """Share of the time in which reads were in flight that compute did not wait for them."""
        if not self.decode_read_s:
            return 1.0
        return max(1.0 - self.decode_flash_stall_s / self.decode_read_s, 0.0)

    @property
    def decode_python_s(self) -> float:
        """The rest of the decode time: the model's code around its products, and messages."""
        known = self.decode_compute_s + self.decode_stall_s + self.decode_others_s
        return max(self.decode_s - known, 0.0)

    @property
    def decode_stall_share(self) -> float:
        """Share of the decode time in which compute waited for a neuron."""
        return self.decode_stall_s / self.decode_s if self.decode_s > 0 else 0.0


NO_STATS = Stats(
    **{f.name: 0.0 if f.type == "float" else 0 for f in dataclasses.fields(Stats)}  # type: ignore[arg-type]
)
"""Those of a request of which nothing is known."""


@dataclass(frozen=True, slots=True)
class Generate:
    request: int
    prompt: str | tuple[int, ...] | tuple[dict[str, str], ...]  # text, token ids or chat turns
    sampling: Sampling
    logits: bool  # send the full logits with every token (for proofs; large)
    trace: bool | None = None  # record where its time goes; None: as the server is set


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class Status:
    request: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sign of life, about once a second, of a request that has nothing else to say."""

    request: int
    ahead: int  # requests before it, running or waiting; 0: it is being computed, or is the next


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How far a prompt is, some times a second while it takes long: of its `tokens`, `tokens_done`
    have gone through all layers, and the `block` tokens that follow through `layers_done` of
    `layers`."""

    request: int
    tokens_done: int  # with those that a request before had computed
    tokens: int
    block: int
    layers_done: int
    layers: int
    eta_s: float  # until the first token, at the pace so far


@dataclass(frozen=True, slots=True)
class Token:
    request: int
    token_id: int
    text: str  # "" while the bytes of a character are incomplete, or may begin a stop text
    logprob: float  # natural log, before temperature and filters
    logits: Raw  # float32 [vocabulary] if asked for, else empty


@dataclass(frozen=True, slots=True)
class Finished:
    request: int
    reason: str  # FINISH_REASONS
    text: str  # what was held back and belongs to the answer after all
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    request: int
    service: str  # who failed it: gateway, compute, predictor or reader
    reason: str
    refused: bool  # it never began


@dataclass(frozen=True, slots=True)
class StatusReply:
    request: int
    report: dict[str, Any]


FINISH_REASONS = ("stop", "length", "cancelled")
"""stop: the model's end token or a stop text; length: max_new_tokens or the context is full."""

CLIENT_CODEC = Codec(
    Generate, Cancel, Status, Waiting, Prefilling, Token, Finished, Failed, StatusReply
)
