"""Token ids in, text that may be shown out. Pure.

Owns the two reasons to hold text back: bytes of a character that is not whole yet, and text that
may turn out to begin a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CHARACTER_BYTES_MAX = 4  # UTF-8
WINDOW_TOKENS_MAX = 64  # a run of bytes that never becomes a character is shown then


class Decoder:
    """Decodes one answer token by token.

    The pieces together are what `tokenizer.decode` makes of all ids, special tokens skipped. Each
    piece is the difference that a token makes to the text of a small window of tokens, because a
    token's text may depend on the one before it (a leading space, a character's first bytes).
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start that were shown before it
        self._shown = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        """The text that this token completes, or ""."""
        if self._tokenizer is None:
            return ""
        self._window.append(token_id)
        text = self._text()
        # At the end, replacement characters may be the bytes of a character that is not whole yet.
        ending = len(text) - len(text.rstrip(REPLACEMENT))
        pending = len(self._window) - self._context
        if ending and pending < CHARACTER_BYTES_MAX:
            return ""
        if ending and pending < WINDOW_TOKENS_MAX:  # no character is that long: bytes, not text
            return self._give(text, len(text) - min(ending, CHARACTER_BYTES_MAX - 1))
        piece = self._give(text, len(text))
        self._slide()
        return piece

    def flush(self) -> str:
        """At the end: what is held back, incomplete characters as U+FFFD."""
        if self._tokenizer is None:
            return ""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _give(self, text: str, until: int) -> str:
        piece = text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece

    def _slide(self) -> None:
        """Forgets the tokens before the last: it alone is context for the next."""
        if not self._text():  # only special tokens so far: what follows is still the beginning
            return
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._shown = len(self._text())


class StopTexts:
    """Finds the first stop text in a stream of text.

    First is the one that is complete first; of two that end together, the longer. So where the
    text is cut into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that certainly is no part of a stop; nothing once one is `found`."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = self._may_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end: what was held back and began no stop text after all."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for size in range(longest, 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stops):
                return size
        return 0


class AnswerText:
    """Decoder and stop texts of one answer."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]):
        self._decoder = Decoder(tokenizer)
        self._stops = StopTexts(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met: nothing more belongs to the answer."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """The text to deliver with this token."""
        return self._stops.push(self._decoder.push(token_id))

    def flush(self) -> str:
        """The text to deliver at the end."""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()
