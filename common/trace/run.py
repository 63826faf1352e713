"""A run: the spans and facts that a server's processes left in its run directory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.messages import SERVICES
from common.spans import NO_REQUEST, NO_STEP, Span, SpanReader
from common.trace.tokens import Token, tokens_of


@dataclass(frozen=True)
class Request:
    """One request as the gateway saw it. Times are ns of the machine's monotonic clock."""

    number: int
    ordinal: int  # the how-manieth of its server, from 1
    prompt_tokens: int
    arrived_ns: int
    started_ns: int  # when compute was given it
    ended_ns: int | None  # None: it is under way, or was when the server ended


@dataclass(frozen=True)
class Chain:
    """What the other processes did for one layer of one step."""

    predict: Span | None = None
    ahead: Span | None = None
    fetches: tuple[Span, ...] = ()
    reads: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Run:
    """All that is known of a run; `facts` is what the gateway said when it began."""

    run_dir: Path
    facts: dict[str, Any]
    spans: dict[str, list[Span]]  # by service, oldest first
    tokens: list[Token]  # whole ones, in time
    requests: list[Request]
    wall_minus_monotonic_ns: int = 0
    chosen: int | None = field(default=None)  # the request that was asked for; None: all

    @cached_property
    def chains(self) -> dict[tuple[int, int], Chain]:
        """By step and layer."""
        found: dict[tuple[int, int], dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
        for service in ("predictor", "reader"):
            for span in self.spans[service]:
                if span.name != "beat":
                    found[span.step, span.layer][span.name].append(span)
        return {
            key: Chain(
                predict=next(iter(spans["predict"]), None),
                ahead=next(iter(spans["ahead"]), None),
                fetches=tuple(spans["fetch"]),
                reads=tuple(sorted(spans["read"], key=lambda span: span.end_ns)),
            )
            for key, spans in found.items()
        }

    @cached_property
    def decoded(self) -> list[Token]:
        """The tokens after each answer's first; all of them if there are no others."""
        return [token for token in self.tokens if token.index > 0] or self.tokens

    def ordinal(self, request: int) -> int:
        return next((r.ordinal for r in self.requests if r.number == request), 0)

    def only(self, wanted: str) -> Run:
        """The run as if it had one request: by its ordinal, its number, or "last"."""
        request = self._find(wanted)
        tokens = [token for token in self.tokens if token.request == request.number]
        steps = {span.step for token in tokens for span in token.spans} - {NO_STEP}
        spans = {  # predictor and reader name one request of a step that some share
            service: [
                span
                for span in found
                if span.request in (request.number, NO_REQUEST)
                or (span.step in steps and service in ("predictor", "reader"))
            ]
            for service, found in self.spans.items()
        }
        if not tokens:
            raise UserError(f"request {request.ordinal} has no token that was traced")
        return Run(
            self.run_dir, self.facts, spans, tokens, [request],
            self.wall_minus_monotonic_ns, request.number,
        )  # fmt: skip

    def _find(self, wanted: str) -> Request:
        if wanted == "last":
            return self.requests[-1]
        for request in self.requests:
            if wanted in (str(request.ordinal), str(request.number)):
                return request
        ordinals = [request.ordinal for request in self.requests]
        raise UserError(
            f"there is no request {wanted!r:.40} in {self.run_dir}; it has the requests"
            f" {min(ordinals)} to {max(ordinals)}, and `last`"
        )


def load_run(run_dir: Path) -> Run:
    """The run in `run_dir`; `UserError` if there is none, or nothing was traced in it."""
    if not (run_dir / "log").is_dir():
        raise UserError(
            f"{run_dir} is no run directory: there is no folder `log` in it; name the --run-dir"
            " that `inflash serve` was given"
        )
    spans: dict[str, list[Span]] = {}
    offset_ns = 0
    for service in SERVICES:
        reader = SpanReader(run_dir, service)
        spans[service] = list(reader.read())
        offset_ns = reader.wall_minus_monotonic_ns or offset_ns
        reader.close()
    tokens = tokens_of(spans["compute"])
    if not tokens:
        raise UserError(
            f"{run_dir} holds no token that was traced: has a request been answered, and is the"
            " server's setting `trace` on? Spans are written within half a second"
        )
    requests = requests_of(spans["gateway"], tokens)
    return Run(run_dir, read_facts(run_dir), spans, tokens, requests, offset_ns)


def requests_of(gateway: Sequence[Span], tokens: Sequence[Token]) -> list[Request]:
    """The requests that have tokens, in order of arrival. One whose own spans are lost is made of
    its tokens."""
    queues = {span.request: span for span in gateway if span.name == "queue"}
    ends = {span.request: span for span in gateway if span.name == "request"}
    first: dict[int, Token] = {}
    for token in tokens:
        first.setdefault(token.request, token)
    lowest = min(first, default=0)
    found = []
    for number, token in first.items():
        queue, end = queues.get(number), ends.get(number)
        either = queue or end
        found.append(
            Request(
                number=number,
                ordinal=either.field("ordinal") if either else number - lowest + 1,
                prompt_tokens=either.field("prompt_tokens") if either else 0,
                arrived_ns=either.start_ns if either else token.start_ns,
                started_ns=queue.end_ns if queue else token.start_ns,
                ended_ns=end.end_ns if end else None,
            )
        )
    return sorted(found, key=lambda request: request.arrived_ns)


def read_facts(run_dir: Path) -> dict[str, Any]:
    """What the last server in a run directory said of itself: the gateway's event `serving`."""
    facts: dict[str, Any] = {}
    for name in ("gateway.jsonl.1", "gateway.jsonl"):
        try:
            lines = (run_dir / "log" / name).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            if '"serving"' in line:
                try:
                    event = json.loads(line)
                except ValueError:  # the last line of a process that was killed
                    continue
                facts = event if event.get("event") == "serving" else facts
    return facts
