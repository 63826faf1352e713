"""Requests, from arrival to their one terminal message. Pure: values in, decisions out.

    arrival ──► refused
       │
       ▼
    waiting ──► running ──► over          as many run together as the KV cache has room for, and
       │           │                      RUNNING_MAX; first come, first served: none overtakes
       │           ▼
       └──────► closing ──► over          a cancel, a stop text: compute is told to end and its
                                          Done brings the figures; CLOSE_S later without them

A request takes room for its prompt and the longest answer that it asks for. The first that waits is
the next to run, whatever room those behind it would need: so each waits for those before it and for
no others; and those that run have a token each in every step. That is the fairness.

Owns who asked for what, the queue and its bound, and the rule that every Generate ends in exactly
one of Finished and Failed. A client that is gone gets nothing, and nothing is computed for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import messages
from common.limits import CLOSE_S, QUEUE_MAX, RUNNING_MAX, WAITING_EVERY_S
from common.plan import kv_room
from inflash import _messages as wire
from services.gateway.decisions import Decision, Noted, ToClient, ToCompute, Traced
from services.gateway.prompts import Prompts
from services.gateway.refusal import Refusal
from services.gateway.text import AnswerText
from services.gateway.totals import Totals


@dataclass(slots=True, eq=False)
class Request:
    """One request under way. Times are seconds of the loop's clock."""

    number: int  # ours: unique in the server's life
    ordinal: int  # the how-manieth of this server, from 1: for people
    client: bytes
    client_number: int
    sampling: wire.Sampling
    logits: bool
    prompt: bytes  # int32
    text: AnswerText
    trace: bool
    arrived: float
    said: float  # when the client last heard of it
    started: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    new_tokens: int = 0
    closing: str = ""  # the finish reason, once it is decided here and not by compute
    close_by: float = 0.0
    over: bool = False  # its terminal message is sent, or its client is gone

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def room(self) -> int:
        """Of the KV cache, tokens: until compute's Done."""
        return kv_room(self.prompt_tokens + self.sampling.max_new_tokens)


class Requests:
    """All requests. Every method takes the time and returns what is to be done, in order."""

    def __init__(
        self,
        prompts: Prompts,
        counters: MutableMapping[str, int],
        first_number: int,
        room: int,
        trace: bool = True,
    ):
        """`room`: of the KV cache, tokens; of a plan at least what the longest request takes.
        `trace`: whether requests that do not say are traced."""
        self._prompts = prompts
        self._counters = counters
        self._first_number = self._next_number = first_number  # large: hit by no stray message
        self._trace = trace
        self.totals = Totals()
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by number: compute has them, or is to end them
        self.room = room
        for name in ("requests", "finished", "failed", "refused", "cancelled", "tokens"):
            counters.setdefault(name, 0)

    @property
    def full(self) -> bool:
        """Whether the next request would be refused for want of room."""
        return len(self.waiting) >= QUEUE_MAX

    def generate(self, client: bytes, message: wire.Generate, now: float) -> list[Decision]:
        """A request arrives: it is queued or refused."""
        if self._find(client, message.request):
            self._count("bad_messages")  # a number in use: which one would an answer be for?
            return []
        try:
            if self.full:
                raise Refusal(f"the queue is full ({QUEUE_MAX} waiting); try again later")
            prompt = self._prompts.read(message.prompt)
            self._prompts.check(message.sampling.forced)
        except Refusal as refusal:
            return self.refuse(client, message.request, str(refusal))
        room = self._prompts.context - len(prompt)
        sampling = message.sampling
        request = Request(
            self._next_number,
            self._next_number - self._first_number + 1,
            client,
            message.request,
            replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)),
            message.logits,
            prompt.tobytes(),
            AnswerText(self._prompts.tokenizer, sampling.stop),
            self._trace if message.trace is None else message.trace,
            arrived=now,
            said=now,
        )
        self._next_number += 1
        self._count("requests")
        self.waiting.append(request)
        fields = {"prompt_tokens": len(prompt), "waiting": len(self.waiting)}
        noted = Noted("admitted", _names(request) | fields)
        return [noted, *self._signs_of_life([request], now)]

    def refuse(self, client: bytes, client_number: int, reason: str) -> list[Decision]:
        """The request never begins."""
        if self._find(client, client_number):
            self._count("bad_messages")  # the one that has the number goes on
            return []
        self._count("requests")
        self._count("refused")
        failed = wire.Failed(client_number, "gateway", reason, True)
        return [ToClient(client, failed), Noted("refused", {"reason": reason})]

    @property
    def room_taken(self) -> int:
        """Of the KV cache, by those that run, tokens."""
        return sum(request.room for request in self.running.values())

    def start(self, now: float) -> list[Decision]:
        """Gives compute the requests that it has room for."""
        decisions: list[Decision] = []
        while self.waiting and len(self.running) < RUNNING_MAX:
            if self.room_taken + self.waiting[0].room > self.room:
                break
            decisions += self._start(self.waiting.popleft(), now)
        return decisions

    def _start(self, request: Request, now: float) -> list[Decision]:
        self.running[request.number] = request
        request.started = now
        queue_s = round(now - request.arrived, 4)
        return [
            ToCompute(
                messages.Admit(
                    request.number,
                    request.sampling,
                    request.logits,
                    request.prompt,
                    request.trace,
                )
            ),
            Noted("started", _names(request) | {"queue_s": queue_s}),
            *self._traced("queue", request, now, request.prompt_tokens),
        ]

    def prefilling(self, message: messages.Prefilling, now: float) -> list[Decision]:
        """Compute is so far with the prompt."""
        request = self.running.get(message.request)
        if request is None:
            self._count("bad_messages")  # no Abort: one that it does not know it gets for a token
            return []
        if request.over or request.closing:
            return []
        request.said = now
        told = asdict(message) | {"request": request.client_number}
        return [ToClient(request.client, wire.Prefilling(**told))]

    def token(self, message: messages.Token, now: float) -> list[Decision]:
        """Compute made a token."""
        request = self.running.get(message.request)
        if request is None:
            self._count("bad_messages")
            return [ToCompute(messages.Abort(message.request))]
        vocabulary = self._prompts.vocabulary
        if not 0 <= message.token_id < vocabulary or len(message.logits) not in (0, 4 * vocabulary):
            self._count("bad_messages")
            return []
        if request.over or request.closing:
            return []  # it crossed our Abort
        self._count("tokens")
        request.new_tokens += 1
        request.said = now
        if request.first_token is None:
            request.first_token = now
        else:
            self.totals.token.add(now - request.last_token)
        request.last_token = now
        text = request.text.push(message.token_id)
        if self._is_last(request, message.token_id):
            text += request.text.flush()
        token = wire.Token(
            request.client_number, message.token_id, text, message.logprob, message.logits
        )
        decisions: list[Decision] = [ToClient(request.client, token)]
        return decisions + (self._close(request, "stop", now) if request.text.stopped else [])

    def done(self, message: messages.Done, now: float) -> list[Decision]:
        """Compute's last word on a request: its room is free."""
        request = self.running.pop(message.request, None)
        if request is None:
            self._count("bad_messages")  # no Abort: it is over already
            return []
        if request.over:
            return []
        if request.closing:
            return self._finish(request, request.closing, message.stats, now)
        if message.reason in wire.FINISH_REASONS:
            return self._finish(request, message.reason, message.stats, now)
        error = message.error or f"it ended for an unknown reason, {message.reason!r:.40}"
        return self._fail(request, message.service or "compute", error, now)

    def cancel(self, client: bytes, client_number: int, now: float) -> list[Decision]:
        """The client wants no more of a request; one that is over is silently ignored."""
        request = self._find(client, client_number)
        if request is None or request.closing:
            return []
        if request.number in self.running:
            return self._close(request, "cancelled", now)
        self.waiting.remove(request)
        return self._finish(request, "cancelled", self._own_stats(request, now), now)

    def client_gone(self, client: bytes) -> list[Decision]:
        """The client went away, or does not read: its requests end without a word."""
        decisions: list[Decision] = []
        for request in [r for r in self._under_way() if r.client == client]:
            request.over = True
            self._count("vanished")
            decisions.append(Noted("vanished", _names(request)))
            if request.number not in self.running:
                self.waiting.remove(request)
            elif not request.closing:
                decisions.append(ToCompute(messages.Abort(request.number)))
        return decisions

    def tick(self, now: float) -> list[Decision]:
        """What the time asks for: signs of life, and the end of closing requests."""
        decisions: list[Decision] = []
        for request in self._under_way():
            if request.closing and now >= request.close_by:
                stats = self._own_stats(request, now)
                decisions += self._finish(request, request.closing, stats, now)
        quiet = [r for r in self._under_way() if now - r.said >= WAITING_EVERY_S]
        return decisions + self._signs_of_life(quiet, now)

    def probe(self, now: float) -> list[Decision]:
        """A word to every waiting request: it finds the clients that are gone."""
        return self._signs_of_life(list(self.waiting), now)

    def fail_all(self, service: str, reason: str, now: float) -> list[Decision]:
        """Nothing more will be computed: every request under way fails."""
        under_way = self._under_way()
        self.waiting.clear()
        self.running.clear()
        return [d for r in under_way for d in self._fail(r, service, reason, now)]

    def _signs_of_life(self, requests: list[Request], now: float) -> list[Decision]:
        under_way = self._under_way()
        for request in requests:
            request.said = now
        ahead = {r.number: 0 if r.number in self.running else under_way.index(r) for r in requests}
        return [
            ToClient(r.client, wire.Waiting(r.client_number, ahead[r.number])) for r in requests
        ]

    def _under_way(self) -> list[Request]:
        return [*(r for r in self.running.values() if not r.over), *self.waiting]

    def _find(self, client: bytes, client_number: int) -> Request | None:
        for request in self._under_way():
            if request.client == client and request.client_number == client_number:
                return request
        return None

    def _is_last(self, request: Request, token_id: int) -> bool:
        """Whether compute will end here: then text that was held back goes with this token."""
        if request.new_tokens >= request.sampling.max_new_tokens:
            return True
        return token_id in self._prompts.end_ids and not request.sampling.ignore_eos

    def _close(self, request: Request, reason: str, now: float) -> list[Decision]:
        request.closing = reason
        request.close_by = now + CLOSE_S
        return [ToCompute(messages.Abort(request.number))]

    def _finish(
        self, request: Request, reason: str, stats: wire.Stats, now: float
    ) -> list[Decision]:
        self._count("cancelled" if reason == "cancelled" else "finished")
        own = self._own_stats(request, now)
        stats = replace(
            stats,
            prompt_tokens=own.prompt_tokens,
            new_tokens=own.new_tokens,  # those that the client got
            queue_s=own.queue_s,
            time_to_first_token_s=own.time_to_first_token_s,
        )
        text = request.text.flush()
        finished = wire.Finished(request.client_number, reason, text, stats)
        self.totals.add(stats)
        figures = {"stats": asdict(stats)}
        return self._end(request, finished, "finished", reason, now, figures)

    def _fail(self, request: Request, service: str, reason: str, now: float) -> list[Decision]:
        self._count("failed")
        failed = wire.Failed(request.client_number, service, reason, False)
        return self._end(request, failed, "failed", f"{service}: {reason}", now)

    def _end(
        self,
        request: Request,
        message: Any,
        event: str,
        reason: str,
        now: float,
        figures: dict[str, Any] | None = None,
    ) -> list[Decision]:
        assert not request.over, "a request ends once"
        request.over = True
        stats = self._own_stats(request, now)
        fields = _names(request) | {
            "reason": reason,
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "queue_s": stats.queue_s,
            "seconds": round(now - request.arrived, 4),
        }
        counts = request.prompt_tokens, request.new_tokens
        return [
            ToClient(request.client, message),
            Noted(event, fields | (figures or {})),
            *self._traced("request", request, now, *counts),
        ]

    def _traced(self, name: str, request: Request, now: float, *fields: int) -> list[Decision]:
        """A span of a request since it arrived."""
        if not request.trace:
            return []
        fields = (request.ordinal, *fields)
        return [Traced(name, request.number, request.arrived, now, fields)]

    def _own_stats(self, request: Request, now: float) -> wire.Stats:
        """The figures that the gateway knows; the others are compute's."""
        started = now if request.started is None else request.started
        first = request.first_token
        return replace(
            wire.NO_STATS,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            queue_s=round(started - request.arrived, 6),
            time_to_first_token_s=0.0 if first is None else round(first - request.arrived, 6),
            decode_s=0.0 if first is None else round(now - first, 6),
        )

    def _count(self, name: str, by: int = 1) -> None:
        self._counters[name] = self._counters.get(name, 0) + by


def _names(request: Request) -> dict[str, Any]:
    return {"request": request.number, "ordinal": request.ordinal}
