"""`inflash chat`: a conversation in a terminal.

Owns the history. A model with a chat template gets turns; one without gets a transcript, and a
stop text where it would speak for the user.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click

from inflash._client import Generation
from inflash._errors import RequestFailed, ServerLost
from inflash._generation import OnPrefill
from inflash._interrupt import cancel_on_interrupt
from inflash._progress import PrefillBar
from inflash._session import Prompt

NAMES = {"user": "User", "assistant": "Assistant"}

Ask = Callable[[Prompt, tuple[str, ...], OnPrefill], Generation]


class Conversation:
    """The turns so far, and the prompt that they make."""

    def __init__(self, has_template: bool, stops: Sequence[str] = ()):
        self.turns: list[dict[str, str]] = []
        self._has_template = has_template
        self._stops = tuple(stops)

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Forgets the last turn: it got no answer."""
        self.turns.pop()

    @property
    def prompt(self) -> Prompt:
        if self._has_template:
            return list(self.turns)
        lines = [f"{NAMES[turn['role']]}: {turn['content']}\n" for turn in self.turns]
        return "".join(lines) + f"{NAMES['assistant']}:"

    @property
    def stops(self) -> tuple[str, ...]:
        return self._stops if self._has_template else (*self._stops, f"\n{NAMES['user']}:")


def converse(conversation: Conversation, ask: Ask) -> None:
    """Reads the user's turns and shows the answers until the input ends."""
    while True:
        try:
            line = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # at the prompt: throw the line away
            click.echo()
            continue
        if line == "/new":
            conversation.turns.clear()
        elif line:
            _answer(conversation, ask, line)


def _answer(conversation: Conversation, ask: Ask, line: str) -> None:
    conversation.add("user", line)
    try:
        with PrefillBar() as bar:
            generation = ask(conversation.prompt, conversation.stops, bar)
            with cancel_on_interrupt(generation):
                shown = _show(generation, bar)
        click.echo(generation.text[shown:])
    except ServerLost:
        raise
    except RequestFailed as error:  # the next turn may do better
        click.echo(f"error: {error}", err=True)
        conversation.take_back()
        return
    conversation.add("assistant", generation.text.strip())


def _show(generation: Generation, bar: PrefillBar) -> int:
    """Shows an answer as it comes; how many characters were shown."""
    shown = 0
    for token in generation:
        bar.end()
        sys.stdout.write(token.text)
        sys.stdout.flush()
        shown += len(token.text)
    return shown
