"""Requests under any history: one terminal message each, in order of arrival, no more at a time
than there is room for."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common import messages
from common.limits import CLOSE_S, KV_ROOM_TOKENS, QUEUE_MAX, RUNNING_MAX
from inflash import _messages as wire
from services.gateway.decisions import Decision, ToClient, ToCompute
from services.gateway.prompts import Prompts
from services.gateway.requests import Requests
from tests.unit.test_text import byte_level

VOCABULARY = 300
CONTEXT = 16
FIRST = 10**18
STATS = wire.Stats(**dict.fromkeys(wire.Stats.__annotations__, 7))


@functools.cache
def prompts(tokenizer: bool = True) -> Prompts:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(
            json.dumps({"vocab_size": VOCABULARY, "eos_token_id": 1})
        )
        if tokenizer:
            byte_level().save(str(folder / "tokenizer.json"))
        return Prompts(folder, CONTEXT)


def requests(tokenizer: bool = True, room: int = KV_ROOM_TOKENS) -> Requests:
    """With room for one at a time, unless said otherwise: every request takes KV_ROOM_TOKENS."""
    return Requests(prompts(tokenizer), {}, FIRST, room)


def generate(number: int, prompt: Any = (1, 2), **sampling: Any) -> wire.Generate:
    return wire.Generate(number, prompt, wire.Sampling(**sampling), False)


def said(decisions: list[Decision]) -> list[Any]:
    """What clients get, in order, signs of life aside."""
    return [m for m in heard(decisions) if not isinstance(m, wire.Waiting)]


def heard(decisions: list[Decision]) -> list[Any]:
    """What clients get, in order."""
    return [d.message for d in decisions if isinstance(d, ToClient)]


def ordered(decisions: list[Decision]) -> list[Any]:
    """What compute gets, in order."""
    return [d.message for d in decisions if isinstance(d, ToCompute)]


def token(number: int, token_id: int = 5) -> messages.Token:
    return messages.Token(number, 1, token_id, -1.0, b"")


def done(number: int, reason: str = "length", service: str = "", error: str = "") -> messages.Done:
    return messages.Done(number, reason, service, error, STATS)


def running(desk: Requests, **sampling: Any) -> int:
    """A request that compute has begun; its own number."""
    desk.generate(b"c", generate(1, **sampling), 0.0)
    admit = ordered(desk.start(1.0))[0]
    assert isinstance(admit, messages.Admit)
    return admit.request


def test_a_request_from_start_to_end() -> None:
    desk = requests()
    number = running(desk, max_new_tokens=2)
    tokens = said(desk.token(token(number), 3.0)) + said(desk.token(token(number), 4.0))
    assert [t.token_id for t in tokens] == [5, 5]
    finished = said(desk.done(done(number), 5.0))[0]
    assert isinstance(finished, wire.Finished)
    assert (finished.request, finished.reason) == (1, "length")
    stats = finished.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.queue_s) == (2, 2, 1.0)
    assert (stats.time_to_first_token_s, stats.bytes_read) == (3.0, 7)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "the prompt is empty"),
        ((), "the prompt is empty"),
        ((VOCABULARY,), "token id 300 is not in the vocabulary, 0 to 299"),
        ((-1,), "token id -1"),
        ((5,) * CONTEXT, r"the prompt has 16 tokens; with one to answer at most 16 fit"),
        ("a b" * 1_000_000, "more than 16 tokens"),
        (({"role": "user", "content": "hi"},), "no chat template"),
    ],
)
def test_refusals(prompt: Any, reason: str) -> None:
    desk = requests()
    refused = said(desk.generate(b"c", generate(1, prompt), 0.0))
    assert len(refused) == 1
    assert isinstance(refused[0], wire.Failed)
    assert refused[0].refused
    assert refused[0].service == "gateway"
    assert re.search(reason, refused[0].reason)
    assert not desk.start(0.0)


def test_text_without_a_tokenizer_is_refused_and_ids_are_not() -> None:
    desk = requests(tokenizer=False)
    assert "no tokenizer" in said(desk.generate(b"c", generate(1, "text"), 0.0))[0].reason
    assert not said(desk.generate(b"c", generate(2, (5,)), 0.0))


def test_the_longest_prompt_gets_one_token() -> None:
    desk = requests()
    desk.generate(b"c", generate(1, (5,) * (CONTEXT - 1), max_new_tokens=99), 0.0)
    admit = ordered(desk.start(0.0))[0]
    assert admit.sampling.max_new_tokens == 1


def test_a_full_queue_refuses() -> None:
    desk = requests()
    running(desk)
    for i in range(QUEUE_MAX):
        assert not said(desk.generate(b"c", generate(10 + i), 0.0))
    refused = said(desk.generate(b"c", generate(99), 0.0))[0]
    assert refused.refused
    assert "the queue is full (16 waiting)" in refused.reason


def test_a_stop_text_ends_the_request_and_compute_is_told() -> None:
    desk = requests()
    number = running(desk, stop=("b",))
    vocabulary = byte_level().get_vocab()
    assert said(desk.token(token(number, vocabulary["a"]), 2.0))[0].text == "a"
    decisions = desk.token(token(number, vocabulary["b"]), 2.0)
    assert said(decisions)[0].text == ""
    assert ordered(decisions) == [messages.Abort(number)]
    assert not desk.token(token(number, vocabulary["c"]), 2.1)  # it crossed the Abort
    finished = said(desk.done(done(number, "cancelled"), 2.2))[0]
    assert (finished.reason, finished.stats.new_tokens) == ("stop", 2)


def test_text_held_back_goes_with_the_last_token() -> None:
    a = byte_level().get_vocab()["a"]
    desk = requests()
    number = running(desk, max_new_tokens=2, stop=("aaa",))
    assert [said(desk.token(token(number, a), 2.0))[0].text for _ in range(2)] == ["", "aa"]


def test_cancel_of_a_running_request_waits_for_the_figures() -> None:
    desk = requests()
    number = running(desk)
    assert ordered(desk.cancel(b"c", 1, 2.0)) == [messages.Abort(number)]
    assert not desk.cancel(b"c", 1, 2.0)
    finished = said(desk.done(done(number, "cancelled"), 2.5))[0]
    assert (finished.reason, finished.stats.bytes_read) == ("cancelled", 7)


def test_cancel_of_a_running_request_waits_not_long() -> None:
    desk = requests()
    number = running(desk)
    desk.generate(b"d", generate(1), 1.0)
    desk.cancel(b"c", 1, 2.0)
    assert [m.reason for m in said(desk.tick(2.0 + CLOSE_S)) if isinstance(m, wire.Finished)] == [
        "cancelled"
    ]
    assert not desk.start(5.0)  # compute is still at it
    assert not desk.done(done(number, "cancelled"), 6.0)
    assert ordered(desk.start(6.0))


def test_a_stray_token_is_counted_and_aborted() -> None:
    counters: dict[str, int] = {}
    desk = Requests(prompts(), counters, FIRST, KV_ROOM_TOKENS)
    assert desk.token(token(5), 0.0) == [ToCompute(messages.Abort(5))]
    assert desk.done(done(5), 0.0) == []
    number = running(desk)
    assert desk.token(token(number, -1), 0.0) == []
    assert desk.token(messages.Token(number, 1, 5, -1.0, b"1234"), 0.0) == []
    assert counters["bad_messages"] == 4


def test_how_far_a_prompt_is_goes_to_its_client() -> None:
    desk = requests()
    number = running(desk)
    told = messages.Prefilling(number, 512, 2048, 512, 3, 32, 9.5)
    assert said(desk.prefilling(told, 5.0)) == [wire.Prefilling(1, 512, 2048, 512, 3, 32, 9.5)]
    assert said(desk.tick(5.9)) == [], "it has just been heard of"
    assert desk.prefilling(replace(told, request=number + 1), 6.0) == [], "not one of ours"
    desk.cancel(b"c", 1, 6.0)
    assert desk.prefilling(told, 6.1) == [], "it crossed our Abort"


def test_an_unknown_reason_of_compute_is_a_failure() -> None:
    desk = requests()
    failed = said(desk.done(done(running(desk), "bored"), 2.0))[0]
    assert (failed.service, failed.refused) == ("compute", False)
    assert "bored" in failed.reason


def test_signs_of_life() -> None:
    desk = requests()
    assert heard(desk.generate(b"c", generate(1), 0.0)) == [wire.Waiting(1, 0)]
    desk.start(0.0)
    assert heard(desk.generate(b"d", generate(7), 0.5)) == [wire.Waiting(7, 1)]
    assert heard(desk.tick(0.9)) == []
    assert heard(desk.tick(1.0)) == [wire.Waiting(1, 0)]
    assert heard(desk.tick(1.5)) == [wire.Waiting(7, 1)]
    assert heard(desk.tick(1.9)) == []
    assert heard(desk.probe(1.9)) == [wire.Waiting(7, 1)]


def test_as_many_run_as_there_is_room_for() -> None:
    desk = requests(room=3 * KV_ROOM_TOKENS)
    for number in range(5):
        desk.generate(b"c", generate(number), 0.0)
    admits = ordered(desk.start(0.0))
    assert [a.request - FIRST for a in admits] == [0, 1, 2]
    assert (len(desk.running), desk.room_taken) == (3, 3 * KV_ROOM_TOKENS)
    assert heard(desk.tick(1.0)) == [
        wire.Waiting(n, ahead) for n, ahead in enumerate((0, 0, 0, 3, 4))
    ]
    assert not desk.start(1.0)
    said(desk.done(done(admits[1].request), 2.0))
    assert [a.request - FIRST for a in ordered(desk.start(2.0))] == [3]
    assert [t.token_id for t in said(desk.token(token(admits[2].request), 3.0))] == [5]


def test_no_more_run_than_share_a_step() -> None:
    desk = requests(room=100 * KV_ROOM_TOKENS)
    for number in range(RUNNING_MAX + 1):
        desk.generate(b"c", generate(number), 0.0)
    assert len(ordered(desk.start(0.0))) == RUNNING_MAX


def test_a_short_request_does_not_overtake_a_long_one() -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
        long = Prompts(Path(name), 4 * KV_ROOM_TOKENS)
    desk = Requests(long, {}, FIRST, 4 * KV_ROOM_TOKENS)
    for number, new in enumerate((KV_ROOM_TOKENS, 4 * KV_ROOM_TOKENS, 1)):
        desk.generate(b"c", generate(number, max_new_tokens=new), 0.0)
    first = ordered(desk.start(0.0))
    assert [a.request - FIRST for a in first] == [0]
    desk.done(done(first[0].request), 1.0)
    assert [a.request - FIRST for a in ordered(desk.start(1.0))] == [1]
    desk.done(done(FIRST + 1), 2.0)
    assert [a.request - FIRST for a in ordered(desk.start(2.0))] == [2]


def test_a_cancelled_request_has_its_room_until_compute_has_ended_it() -> None:
    desk = requests(room=2 * KV_ROOM_TOKENS)
    for number in range(3):
        desk.generate(b"c", generate(number), 0.0)
    desk.start(0.0)
    desk.cancel(b"c", 0, 1.0)
    desk.tick(1.0 + CLOSE_S)
    assert not ordered(desk.start(4.0))
    desk.done(done(FIRST, "cancelled"), 5.0)
    assert ordered(desk.start(5.0))


class History(RuleBasedStateMachine):
    """Any order of what clients, compute and time can do."""

    @initialize(at_once=st.integers(1, 3))
    def begin(self, at_once: int) -> None:
        self.now = 0.0
        self.at_once = at_once
        self.desk = requests(room=at_once * KV_ROOM_TOKENS)
        self.in_compute: list[int] = []  # what compute has and has not ended
        self.aborted: set[int] = set()
        self.arrived: list[tuple[bytes, int]] = []
        self.gone: set[bytes] = set()
        self.terminal: Counter[tuple[bytes, int]] = Counter()
        self.admitted: list[int] = []
        self.next = 0

    def do(self, decisions: list[Decision]) -> None:
        for d in decisions:
            if isinstance(d, ToClient):
                key = d.client, d.message.request
                assert key[0] not in self.gone
                assert self.terminal[key] == 0, "nothing after the terminal message"
                self.terminal[key] += isinstance(d.message, wire.Finished | wire.Failed)
            elif isinstance(d, ToCompute) and isinstance(d.message, messages.Admit):
                self.in_compute.append(d.message.request)
                assert len(self.in_compute) <= self.at_once
                self.admitted.append(d.message.request)
            elif isinstance(d, ToCompute):
                self.aborted.add(d.message.request)

    @rule(client=st.sampled_from([b"a", b"b", b"c"]), bad=st.booleans(), stop=st.booleans())
    def generate(self, client: bytes, bad: bool, stop: bool) -> None:
        if client in self.gone:
            return
        self.next += 1
        self.arrived.append((client, self.next))
        message = generate(self.next, () if bad else (1, 2), stop=("a",) if stop else ())
        self.do(self.desk.generate(client, message, self.now))

    @rule(data=st.data())
    def generate_again(self, data: st.DataObject) -> None:
        under_way = [k for k in self.arrived if not self.terminal[k] and k[0] not in self.gone]
        if under_way:
            client, number = data.draw(st.sampled_from(under_way))
            assert self.desk.generate(client, generate(number), self.now) == []

    @rule()
    def probe(self) -> None:
        self.do(self.desk.probe(self.now))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.arrived:
            client, number = data.draw(st.sampled_from(self.arrived))
            self.do(self.desk.cancel(client, number, self.now))

    @rule(client=st.sampled_from([b"a", b"b"]))
    def vanish(self, client: bytes) -> None:
        self.gone.add(client)
        self.do(self.desk.client_gone(client))

    @rule()
    def start(self) -> None:
        self.do(self.desk.start(self.now))

    @rule(token_id=st.sampled_from([1, 5, -1]) | st.integers(0, VOCABULARY - 1), data=st.data())
    def compute_token(self, token_id: int, data: st.DataObject) -> None:
        if self.in_compute:
            number = data.draw(st.sampled_from(self.in_compute))
            self.do(self.desk.token(token(number, token_id), self.now))

    @rule(
        reason=st.sampled_from(["stop", "length", "cancelled", "failed", "odd"]),
        place=st.integers(0, 2),
    )
    def compute_done(self, reason: str, place: int) -> None:
        if self.in_compute:
            number = self.in_compute.pop(place % len(self.in_compute))
            self.do(self.desk.done(done(number, reason, "reader", "why"), self.now))

    @rule(number=st.integers(0, 9))
    def stray(self, number: int) -> None:
        self.do(self.desk.token(token(number), self.now))
        self.do(self.desk.done(done(number), self.now))
        self.do(self.desk.cancel(b"a", -number, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.1, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.desk.tick(self.now))

    @invariant()
    def in_order_and_bounded(self) -> None:
        if hasattr(self, "desk"):
            assert self.admitted == sorted(self.admitted)
            assert len(self.desk.waiting) <= QUEUE_MAX

    @invariant()
    def room_is_accounted_for(self) -> None:
        if hasattr(self, "desk"):
            assert set(self.desk.running) == set(self.in_compute)

    def teardown(self) -> None:
        if not hasattr(self, "desk"):
            return
        if self.next % 2:
            self.do(self.desk.fail_all("reader", "it is gone", self.now))
            self.in_compute.clear()
        while self.desk.running or self.desk.waiting:
            self.start()
            self.compute_done("length", 0)
        for key in self.arrived:
            if key[0] not in self.gone:
                assert self.terminal[key] == 1, key


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
