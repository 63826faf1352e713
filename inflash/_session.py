"""One connection's requests without the connection: what to send, what came, when to worry.

Owns the request numbers, what came and was not taken yet, and the rule that tells a busy server
from a dead one. Sans-IO: no socket, no clock; `Client` and `AsyncClient` are its two skins.

    heard from it less than QUIET_S ago     it lives; a prefill may take minutes
    longer                                  ask for its status; no word within `timeout`: lost
    the connection is gone                  lost at once (the sockets' heartbeats see to that)
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from inflash._messages import (
    CLIENT_CODEC,
    Cancel,
    Failed,
    Finished,
    Generate,
    Prefilling,
    Sampling,
    Status,
    StatusReply,
    Token,
    Waiting,
)
from inflash._wire import BadMessage, Raw

QUIET_S = 5.0  # the gateway says something every second; this long without a word is odd
FIND_S = 2.0  # a server that runs answers its first status request in milliseconds

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat turns: {"role": "user", "content": "..."}."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection ended under a request."""

    reason: str


Answer = Waiting | Prefilling | Token | Finished | Failed | StatusReply
Event = Answer | Lost


class Mailbox:
    """What came for one request and was not taken yet."""

    def __init__(self, number: int, now: float, wake: Callable[[], None]):
        self.number = number
        self.events: deque[Event] = deque()
        self.heard = now
        self._wake = wake

    def put(self, event: Event) -> None:
        self.events.append(event)
        self._wake()


class Session:
    """The requests of one connection. `now` is seconds of any monotonic clock, always the same."""

    def __init__(self, timeout_s: float, now: float, numbers: Iterator[int]):
        """`numbers` outlive the session: a request of an earlier one is not taken for one of
        this one."""
        self.timeout_s = timeout_s
        self.alive = True
        self.dropped = 0  # bad messages from the server
        self._open: dict[int, Mailbox] = {}
        self._numbers = numbers
        self._heard = now
        self._asked: float | None = None  # when we asked a silent server for its status

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        logits: bool,
        now: float,
        wake: Callable[[], None] = lambda: None,
        trace: bool | None = None,
    ) -> tuple[Mailbox, list[Raw]]:
        """Opens a request; returns its mailbox and the frames to send."""
        number = next(self._numbers)
        frames = CLIENT_CODEC.encode(Generate(number, wire_prompt(prompt), sampling, logits, trace))
        return self._open_mailbox(number, now, wake), frames

    def status(
        self, now: float, wake: Callable[[], None] = lambda: None
    ) -> tuple[Mailbox, list[Raw]]:
        """Opens a status request; returns its mailbox and the frames to send."""
        number = next(self._numbers)
        return self._open_mailbox(number, now, wake), CLIENT_CODEC.encode(Status(number))

    def cancel(self, number: int) -> list[Raw] | None:
        """The frames to send, or None if the request is over."""
        return CLIENT_CODEC.encode(Cancel(number)) if number in self._open else None

    def forget(self, number: int) -> None:
        """Nobody will take what still comes for this request."""
        self._open.pop(number, None)

    def receive(self, frames: Sequence[Raw], now: float) -> None:
        """Takes one message from the server; a bad one is counted and dropped."""
        self._heard, self._asked = now, None
        try:
            message = CLIENT_CODEC.decode(frames)
            if not isinstance(message, Answer):
                raise BadMessage("a client's message")
            if isinstance(message, Token) and len(message.logits) % 4:
                raise BadMessage("logits that are no float32")
        except BadMessage:
            self.dropped += 1
            return
        if mailbox := self._open.get(message.request):
            mailbox.heard = now
            if isinstance(message, Finished | Failed | StatusReply):
                del self._open[message.request]
            mailbox.put(message)

    def lost(self, reason: str) -> None:
        """Ends every request: the connection is of no use any more."""
        self.alive = False
        mailboxes = list(self._open.values())
        self._open.clear()
        for mailbox in mailboxes:
            mailbox.put(Lost(reason))

    def wait_s(self, now: float) -> float:
        """How long nothing needs to be done unless a message comes."""
        if not self._open:
            return QUIET_S
        due = self._heard + QUIET_S if self._asked is None else self._asked + self.timeout_s
        return max(0.0, due - now)

    def check(self, now: float) -> list[Raw] | None:
        """Frames of a status request if the server has been silent; `lost` if it stays so.

        Call it only when everything that had come was received.
        """
        if not self._open or self.wait_s(now) > 0:
            return None
        if self._asked is None:  # it lives; whether it does is asked below
            self._give_up_silent(now)
        if self._asked is not None:
            self.lost(
                f"the client waited {self.timeout_s:g} s for any word from the gateway, which is"
                " connected but answers nothing (setting: the client's timeout)"
            )
            return None
        self._asked = now
        return CLIENT_CODEC.encode(Status(next(self._numbers)))

    def _give_up_silent(self, now: float) -> None:
        """The gateway has a word every second for each request that it knows: one that it says
        nothing of is over there, and its last word was lost."""
        for mailbox in list(self._open.values()):
            if now - mailbox.heard > self.timeout_s:
                del self._open[mailbox.number]
                mailbox.put(Lost(f"no word on this request for {self.timeout_s:g} s"))

    def _open_mailbox(self, number: int, now: float, wake: Callable[[], None]) -> Mailbox:
        if not self._open:
            self._heard, self._asked = now, None  # while we asked nothing, silence meant nothing
        mailbox = self._open[number] = Mailbox(number, now, wake)
        return mailbox


def wire_prompt(prompt: Prompt) -> str | tuple[int, ...] | tuple[dict[str, str], ...]:
    """A prompt as Generate has it; `TypeError` for what is neither text, ids nor chat turns."""
    if isinstance(prompt, str):
        return prompt
    turns: list[dict[str, str]] = []
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, Mapping):
            turns.append(_wire_turn(item))
        else:
            ids.append(operator.index(item))  # numpy's and torch's integers too
    if turns and ids:
        raise TypeError("a prompt is text, token ids or chat turns, not a mixture")
    return tuple(turns) if turns else tuple(ids)


def _wire_turn(turn: Mapping[str, str]) -> dict[str, str]:
    if not {"role", "content"} <= turn.keys() or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in turn.items()
    ):
        raise TypeError(f"a chat turn is a map of texts with role and content, not {turn!r:.80}")
    return dict(turn)
