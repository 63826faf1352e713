"""A run as a trace that Perfetto and chrome://tracing open: the JSON trace event format. Pure.

One track per process, and in compute one for each of the requests that run together. Spans of one
track nest; reads, and requests in the gateway, overlap and are
asynchronous events. Arrows go Predict → Fetch → Read → FFN, of look-ahead too.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.messages import SERVICES
from common.spans import Span
from common.trace.run import Chain, Run
from common.trace.tokens import CAUSES, Layer, Token

Event = dict[str, Any]
PIDS = {service: number for number, service in enumerate(SERVICES, 1)}
THREAD = 1
_OVERLAPPING = ("read", "request", "queue")


def trace_of(run: Run) -> dict[str, Any]:
    """The whole file as one object."""
    start_ns = min(span.start_ns for spans in run.spans.values() for span in spans)
    lanes = lanes_of(run)
    events = [*_names(lanes), *_spans(run, lanes, start_ns), *_counters(run, start_ns)]
    number = 0
    for token in run.tokens:
        for layer in token.layers:
            for flow in _flows(token, layer, run.chains.get((layer.step, layer.layer), Chain())):
                number += 1
                events += _arrows(flow, number, lanes[token.request], start_ns)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run_dir": str(run.run_dir), "store": run.facts.get("store", {})},
    }


def lanes_of(run: Run) -> dict[int, int]:
    """Which of compute's tracks each request has: the first that is free while it runs."""
    lanes: dict[int, int] = {}
    free_ns: list[int] = []  # by lane
    ends = {token.request: token.end_ns for token in run.tokens}
    for token in sorted(run.tokens, key=lambda token: token.start_ns):
        if token.request not in lanes:
            lane = next((n for n, ns in enumerate(free_ns) if ns <= token.start_ns), len(free_ns))
            free_ns[lane : lane + 1] = [ends[token.request]]
            lanes[token.request] = THREAD + lane
    return lanes


def _names(lanes: dict[int, int]) -> Iterator[Event]:
    for service, pid in PIDS.items():
        for kind, args in (
            ("process_name", {"name": service}),
            ("process_sort_index", {"sort_index": pid}),
            ("thread_name", {"name": "loop"}),
        ):
            yield {"ph": "M", "name": kind, "pid": pid, "tid": THREAD, "args": args}
    for lane in sorted(set(lanes.values()) - {THREAD}):
        args = {"name": f"loop, beside {lane - THREAD} others"}
        yield {"ph": "M", "name": "thread_name", "pid": PIDS["compute"], "tid": lane, "args": args}


def _spans(run: Run, lanes: dict[int, int], start_ns: int) -> Iterator[Event]:
    for service, spans in run.spans.items():
        pid = PIDS[service]
        whole = {(t.request, t.index) for t in run.tokens}
        number = 0
        for span in spans if service != "compute" else _of_tokens(run):
            if span.name == "beat":
                continue
            if span.name == "deliver" and (span.request, span.field("index")) not in whole:
                continue
            args: dict[str, Any] = {"request": run.ordinal(span.request)}
            args |= {"step": span.step, "layer": span.layer} if span.step >= 0 else {}
            lane = lanes[span.request] if service == "compute" else THREAD
            common = {"name": span.name, "cat": service, "pid": pid, "tid": lane}
            args |= span.named_fields()
            if span.name in _OVERLAPPING:
                number += 1
                begin = common | {"cat": span.name, "id": f"{service}-{number}"}
                yield begin | {"ph": "b", "ts": _us(span.start_ns, start_ns), "args": args}
                yield begin | {"ph": "e", "ts": _us(span.end_ns, start_ns)}
                if span.name == "read":  # what an arrow can point at: it was given to the drive
                    yield common | {
                        "name": "submit", "ph": "X", "ts": _us(span.start_ns, start_ns),
                        "dur": SUBMIT_US, "args": args,
                    }  # fmt: skip
            else:
                yield common | {
                    "ph": "X", "ts": _us(span.start_ns, start_ns), "dur": span.ns / 1000,
                    "args": args,
                }  # fmt: skip


SUBMIT_US = 1.0


def _of_tokens(run: Run) -> Iterator[Span]:
    """Compute's spans, outer ones first."""
    for token in run.tokens:
        index = (token.index, token.delayed_ns)
        yield Span("token", token.request, token.layers[-1].step if token.layers else -1, -1,
                   token.start_ns, token.ns, index)  # fmt: skip
        yield from sorted(token.spans, key=lambda span: (span.start_ns, -span.ns))


def _counters(run: Run, start_ns: int) -> Iterator[Event]:
    """What each token took by cause, as a graph over time."""
    for token in run.tokens:
        yield {
            "ph": "C", "name": "token, ms by cause", "pid": PIDS["compute"], "tid": THREAD,
            "ts": _us(token.end_ns, start_ns),
            "args": {cause: token.by_cause[cause] / 1e6 for cause in CAUSES},
        }  # fmt: skip


Point = tuple[str, int]  # service, ns within one of its spans


def _flows(token: Token, layer: Layer, chain: Chain) -> Iterator[list[Point]]:
    """The ways of a layer's parts: a point in each span that an arrow touches."""
    own = [span for span in token.spans if (span.step, span.layer) == (layer.step, layer.layer)]
    parts = {span.field("part"): span for span in own if span.name == "ffn"}
    ask = next((span for span in own if span.name == "ask"), None)
    demand = next((f for f in chain.fetches if not f.field("prefetch")), None)
    if ask and chain.predict and demand:
        head = [_in("compute", ask), _in("predictor", chain.predict), _in("reader", demand)]
        if 0 in parts:
            yield [*head, _in("compute", parts[0])]
        for read in chain.reads:
            if read.field("part") in parts and not read.field("prefetch"):
                yield [*head, ("reader", read.start_ns), _in("compute", parts[read.field("part")])]
    prefetch = next((f for f in chain.fetches if f.field("prefetch")), None)
    if chain.ahead and prefetch and 0 in parts:
        for read in chain.reads:
            if read.field("prefetch") and read.start_ns < parts[0].start_ns:
                yield [_in("predictor", chain.ahead), _in("reader", prefetch),
                       ("reader", read.start_ns), _in("compute", parts[0])]  # fmt: skip


def _in(service: str, span: Span) -> Point:
    return service, span.start_ns


def _arrows(flow: list[Point], number: int, lane: int, start_ns: int) -> Iterator[Event]:
    for place, (service, ns) in enumerate(flow):
        phase = "s" if place == 0 else "f" if place == len(flow) - 1 else "t"
        event = {
            "ph": phase, "name": "part", "cat": "part", "id": number, "pid": PIDS[service],
            "tid": lane if service == "compute" else THREAD, "ts": _us(ns, start_ns),
        }  # fmt: skip
        yield event | ({"bp": "e"} if phase != "s" else {})


def _us(ns: int, start_ns: int) -> float:
    return (ns - start_ns) / 1000
