"""The client's core, without a socket: who gets what, and when a silent server is given up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from inflash import _messages as wire
from inflash._errors import RequestFailed, RequestRefused, ServerLost
from inflash._generation import End, GenerationState
from inflash._session import QUIET_S, Mailbox, Session, wire_prompt

TIMEOUT_S = 60.0
STATS = wire.Stats(**dict.fromkeys(wire.Stats.__annotations__, 0))


def session() -> Session:
    return Session(TIMEOUT_S, 100.0, itertools.count(1))


def ask(core: Session, now: float = 100.0) -> tuple[Mailbox, wire.Generate]:
    mailbox, frames = core.generate([1, 2], wire.Sampling(), False, now)
    return mailbox, wire.CLIENT_CODEC.decode(frames)


def say(core: Session, message: Any, now: float = 100.0) -> None:
    core.receive(wire.CLIENT_CODEC.encode(message), now)


def test_answers_go_to_their_request() -> None:
    core = session()
    (one, first), (two, second) = ask(core), ask(core)
    assert first.request != second.request
    say(core, wire.Token(second.request, 5, "b", -1.0, b""))
    say(core, wire.Token(first.request, 4, "a", -1.0, b""))
    assert [e.text for e in one.events if isinstance(e, wire.Token)] == ["a"]
    assert [e.text for e in two.events if isinstance(e, wire.Token)] == ["b"]


def test_nothing_comes_after_the_end() -> None:
    core = session()
    mailbox, asked = ask(core)
    say(core, wire.Finished(asked.request, "stop", "", STATS))
    say(core, wire.Token(asked.request, 4, "a", -1.0, b""))
    assert len(mailbox.events) == 1
    assert core.cancel(asked.request) is None


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xff\xff"],
        [],
        wire.CLIENT_CODEC.encode(wire.Cancel(1)),
        wire.CLIENT_CODEC.encode(wire.Token(1, 1, "", 0.0, b"123")),
    ],
)
def test_bad_messages_are_counted_and_dropped(frames: list[Any]) -> None:
    core = session()
    mailbox, _ = ask(core)
    core.receive(frames, 100.0)
    assert core.dropped == 1
    assert not mailbox.events


def test_a_silent_server_is_asked_and_then_given_up() -> None:
    core = session()
    mailbox, _ = ask(core, now=200.0)
    assert core.check(200.0 + QUIET_S - 0.1) is None
    frames = core.check(200.0 + QUIET_S)
    assert isinstance(wire.CLIENT_CODEC.decode(frames or []), wire.Status)
    assert core.check(201.0 + QUIET_S) is None
    assert core.wait_s(201.0 + QUIET_S) == pytest.approx(TIMEOUT_S - 1)
    assert core.check(200.0 + QUIET_S + TIMEOUT_S) is None
    assert not core.alive
    with pytest.raises(ServerLost, match=r"the client waited 60 s .* timeout"):
        GenerationState(mailbox)._take()


def test_a_busy_server_that_says_so_is_never_given_up() -> None:
    core = session()
    mailbox, asked = ask(core, now=0.0)
    generation = GenerationState(mailbox)
    now = 0.0
    while now < 10 * TIMEOUT_S:
        now += 1.0
        say(core, wire.Waiting(asked.request, 3), now)
        assert core.check(now) is None
        assert generation._take() is None
    assert core.alive
    assert generation.ahead == 3


def test_any_word_answers_the_question() -> None:
    core = session()
    ask(core, now=0.0)
    assert core.check(QUIET_S)
    core.receive([b"nonsense"], QUIET_S + 1)
    assert core.wait_s(QUIET_S + 1) == QUIET_S


def test_an_idle_connection_may_be_silent() -> None:
    core = session()
    assert core.check(1e6) is None
    ask(core, now=1e6)
    assert core.check(1e6 + 1) is None


def test_a_generation_collects_its_text_and_ends_once() -> None:
    core = session()
    mailbox, asked = ask(core)
    generation = GenerationState(mailbox)
    logits = b"\0\0\0\0\0\0\x80?"
    say(core, wire.Token(asked.request, 4, "a", -1.0, logits))
    say(core, wire.Token(asked.request, 5, "", -2.0, b""))
    say(core, wire.Finished(asked.request, "length", "z", STATS))
    token = generation._take()
    assert token is not None
    assert token.logits is not None
    assert list(token.logits) == [0.0, 1.0]
    token = generation._take()
    assert token is not None
    assert token.logits is None
    assert (generation.finish_reason, generation.stats) == (None, None)
    for _ in range(2):
        with pytest.raises(End):
            generation._take()
    assert (generation.text, generation.finish_reason, generation.stats) == ("az", "length", STATS)


@pytest.mark.parametrize(("refused", "kind"), [(True, RequestRefused), (False, RequestFailed)])
def test_failures_name_the_service(refused: bool, kind: type[RequestFailed]) -> None:
    core = session()
    mailbox, asked = ask(core)
    say(core, wire.Failed(asked.request, "reader", "it broke", refused))
    generation = GenerationState(mailbox)
    with pytest.raises(RequestFailed, match="reader: it broke") as failure:
        generation._take()
    assert type(failure.value) is kind
    assert (failure.value.service, failure.value.reason) == ("reader", "it broke")
    with pytest.raises(End):
        generation._take()


def test_prompts() -> None:
    class Index:
        def __index__(self) -> int:
            return 7

    turns = [{"role": "user", "content": "hi"}]
    assert wire_prompt("a") == "a"
    assert wire_prompt(range(3)) == (0, 1, 2)
    assert wire_prompt([Index()]) == (7,)  # type: ignore[arg-type]
    assert wire_prompt(turns) == tuple(turns)
    assert wire_prompt([]) == ()
    for wrong in (
        [1, turns[0]],
        [{"role": "user"}],
        [1.5],
        [{"role": "user", "content": 1}],
        ["a"],
    ):
        with pytest.raises(TypeError):
            wire_prompt(wrong)  # type: ignore[arg-type]


def test_a_request_that_a_living_server_forgot_is_given_up() -> None:
    core = session()
    mailbox, _ = ask(core, now=200.0)
    now = 200.0
    while not mailbox.events:
        now += QUIET_S
        assert now < 200.0 + 2 * TIMEOUT_S
        if frames := core.check(now):
            status = wire.CLIENT_CODEC.decode(frames)
            core.receive(wire.CLIENT_CODEC.encode(wire.StatusReply(status.request, {})), now)
    assert core.alive
    with pytest.raises(ServerLost, match="no word on this request"):
        GenerationState(mailbox)._take()
