"""An answer on its way, as the user sees it: its tokens, its text so far, how it ended.

Shared by `Generation` and `AsyncGeneration`, which only add how to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from inflash import _messages as wire
from inflash._errors import InflashError, RequestFailed, RequestRefused, ServerLost
from inflash._session import Lost, Mailbox


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    `text` is what can be shown now: "" while a character's bytes are incomplete or while the text
    may turn out to begin a stop text; what was held back comes with a later token. `logprob` is
    the natural logarithm of its probability, before temperature and filters. `logits` is a
    memoryview of float32, shape (vocabulary,), if they were asked for, else None.
    """

    id: int
    text: str
    logprob: float
    logits: memoryview[float] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Prefill:
    """How far a prompt is: of its `tokens`, `tokens_done` have gone through all layers, and the
    `block` tokens that follow through `layers_done` of `layers`. `eta_s`: seconds until the first
    token, at the pace so far.
    """

    tokens_done: int
    tokens: int
    block: int
    layers_done: int
    layers: int
    eta_s: float

    @property
    def share(self) -> float:
        """Of the whole prompt, what is done."""
        return (self.tokens_done + self.block * self.layers_done / self.layers) / self.tokens


OnPrefill = Callable[[Prefill], None]


class End(Exception):  # noqa: N818  (no error: the iterator's end)
    """The answer is over; each skin turns it into its own StopIteration."""


class GenerationState:
    """What is known of an answer so far."""

    def __init__(self, mailbox: Mailbox, on_prefill: OnPrefill | None = None):
        self._mailbox = mailbox
        self._on_prefill = on_prefill
        self._prefill: Prefill | None = None
        self._pieces: list[str] = []
        self._over = False
        self._ahead: int | None = None
        self._finish_reason: str | None = None
        self._stats: wire.Stats | None = None

    @property
    def text(self) -> str:
        """The answer's text so far, stop text excluded."""
        return "".join(self._pieces)

    @property
    def ahead(self) -> int | None:
        """Requests before this one in the queue when the server last said so; None: it has not."""
        return self._ahead

    @property
    def prefill(self) -> Prefill | None:
        """How far the prompt was when the server last said so; None: it has not. A prompt that
        takes long is told of some times a second."""
        return self._prefill

    @property
    def finish_reason(self) -> str | None:
        """stop, length or cancelled; None until the iterator has ended."""
        return self._finish_reason

    @property
    def stats(self) -> wire.Stats | None:
        """Where time and bytes went; None until the iterator has ended."""
        return self._stats

    def _take(self) -> Token | None:
        """The next token, or None if nothing came yet; raises `End` or the request's failure."""
        if self._over:
            raise End
        events = self._mailbox.events
        while events:
            match events.popleft():
                case wire.Waiting(ahead=ahead):
                    self._ahead = ahead
                case wire.Prefilling() as told:
                    self._ahead = 0
                    tokens = told.tokens_done, told.tokens, told.block
                    self._prefill = Prefill(*tokens, told.layers_done, told.layers, told.eta_s)
                    if self._on_prefill:
                        self._on_prefill(self._prefill)
                case wire.Token() as token:
                    self._pieces.append(token.text)
                    logits = memoryview(token.logits).cast("f") if token.logits else None
                    return Token(token.token_id, token.text, token.logprob, logits)
                case wire.Finished() as finished:
                    self._over = True
                    self._pieces.append(finished.text)
                    self._finish_reason, self._stats = finished.reason, finished.stats
                    raise End
                case wire.Failed() | Lost() as failed:
                    self._over = True
                    raise _error_of(failed)
        return None


def _error_of(failed: wire.Failed | Lost) -> InflashError:
    if isinstance(failed, Lost):
        return ServerLost("gateway", failed.reason)
    kind = RequestRefused if failed.refused else RequestFailed
    return kind(failed.service, failed.reason)
