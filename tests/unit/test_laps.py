"""Compute's spans of requests that run together: each one's lie end to end."""

from __future__ import annotations

import itertools
import time

from common.spans import NO_STEP, Recorder, Span
from common.trace.tokens import LEAVES, tokens_of
from services.compute.laps import Laps
from services.compute.waits import LayerWaits


class Compute:
    """Steps as the loop makes them, with sleeps in the place of work."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.laps = Laps(self.recorder)
        self.step = 0

    def begin(self, request: int, trace: bool = True) -> None:
        self.laps.begin(request, trace)
        self.laps.turn([request], NO_STEP)
        self.laps.lap("admit", -1, 0)

    def run(self, requests: list[int], **counts: int) -> None:
        self.step += 1
        self.laps.turn(requests, self.step)
        began_ns = self.laps.at_ns
        time.sleep(0.002)
        self.laps.lap("attention", 0, 1000)
        waits = LayerWaits(len(requests), self.laps.at_ns, **counts)
        time.sleep(0.001)
        self.laps.lap("ffn", 0, 0, 9)
        self.laps.layer(0, waits)
        self.laps.lap("head", -1, 0)
        self.laps.since("step", began_ns, -1, len(requests))

    def tokens(self, **indices: int) -> None:
        self.laps.lap("sample")
        self.laps.lap("send")
        for name, index in indices.items():
            self.laps.token(int(name[1:]), index)

    def spans(self) -> list[Span]:
        return [Span(*row[:6], tuple(row[6:])) for row in self.recorder.take()]


def test_spans_of_each_request_lie_end_to_end() -> None:
    compute = Compute()
    compute.begin(1)
    compute.run([1])
    compute.tokens(r1=0)
    compute.begin(2)
    compute.begin(3, trace=False)
    compute.run([2])  # its prompt
    compute.run([3])
    compute.run([1])
    compute.tokens(r1=1)
    compute.run([2])
    compute.tokens(r2=0)
    compute.run([1, 2, 3], hits=8, bytes_read=4097)
    compute.tokens(r1=2, r2=1, r3=0)
    spans = compute.spans()
    assert {span.request for span in spans} == {1, 2}, "the third is not traced"
    for request in (1, 2):
        leaves = [s for s in spans if s.request == request and s.name in LEAVES]
        for before, after in itertools.pairwise(leaves):
            assert before.end_ns == after.start_ns, (before, after)
    tokens = tokens_of(spans)
    assert sorted((t.request, t.index) for t in tokens) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    for token in tokens:
        assert sum(token.by_cause.values()) == token.ns
    others = {(t.request, t.index): t.by_cause["others"] for t in tokens}
    assert others[1, 0] == 0
    assert others[1, 1] > 6e6, "two blocks of others' prompts"
    assert compute.laps.others_ns(1) == others[1, 1] + others[1, 2]
    assert compute.laps.end(3) > 3e6


def test_what_a_layer_counts_is_divided_among_those_who_share_it() -> None:
    compute = Compute()
    for request in (1, 2, 3):
        compute.begin(request)
    compute.run([1, 2, 3], hits=8, bytes_read=4097)
    layers = [span for span in compute.spans() if span.name == "layer"]
    assert [span.field("hits") for span in layers] == [2, 3, 3]
    assert sum(span.field("bytes_read") for span in layers) == 4097
    assert {span.field("rows") for span in layers} == {3}


def test_time_without_a_request_is_nobodys() -> None:
    compute = Compute()
    compute.begin(1)
    compute.run([1])
    compute.tokens(r1=0)
    compute.laps.end(1)
    time.sleep(0.01)
    asked_ns = time.monotonic_ns()
    compute.begin(2)
    compute.run([2])
    compute.tokens(r2=0)
    (token,) = [token for token in tokens_of(compute.spans()) if token.request == 2]
    assert token.by_cause["others"] == 0
    assert token.start_ns >= asked_ns
