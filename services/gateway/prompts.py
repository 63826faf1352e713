"""Prompts in, token ids out. Pure once the model's files are read.

Owns the tokenizer, the chat template and the checks of a prompt. Refuses what is empty, too long
for the context, outside the vocabulary, or text for a model without a tokenizer.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.store.store import read_end_ids
from services.gateway.chat import read_chat_template
from services.gateway.refusal import Refusal

Prompt = str | tuple[int, ...] | tuple[dict[str, str], ...]


class Prompts:
    """What the gateway knows of the model. `context`: tokens of prompt and answer together."""

    def __init__(self, folder: Path, context: int):
        config = _read_json(folder / "config.json")
        self.context = context
        self.vocabulary = int(config["vocab_size"])
        self.end_ids = read_end_ids(folder)
        self.tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._template = read_chat_template(folder)
        self._token_chars_max = 1
        if self.tokenizer is not None:
            self._token_chars_max = max(map(len, self.tokenizer.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def read(self, prompt: Prompt) -> array[int]:
        """The prompt's token ids, int32; `Refusal` says why there are none."""
        ids = self._ids(prompt)
        if not ids:
            raise Refusal("the prompt is empty")
        if len(ids) + 1 > self.context:
            raise self._too_long(f"{len(ids):,}")
        self.check(ids)
        return array("i", ids)

    def check(self, ids: Sequence[int]) -> None:
        """`Refusal` for a token id that the model does not have."""
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise Refusal(f"token id {wrong} is not in the vocabulary, 0 to {self.vocabulary - 1}")

    def _ids(self, prompt: Prompt) -> list[int] | tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True)
        if prompt and isinstance(prompt[0], dict):
            if self._template is None:
                raise Refusal("the model has no chat template; send the prompt as text")
            text = self._template.render([turn for turn in prompt if isinstance(turn, dict)])
            # The template has written the special tokens that it wants.
            return self._encode(text, add_special_tokens=False)
        return tuple(i for i in prompt if isinstance(i, int))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise Refusal("the model has no tokenizer; send the prompt as token ids")
        if not text:
            return []  # a tokenizer would make it a lone begin token
        # Not even tokenized: megabytes would keep every other client waiting.
        if len(text) > self.context * self._token_chars_max:
            raise self._too_long(f"more than {self.context:,}")
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises no narrower one; the text is the client's
            raise Refusal(f"the model's tokenizer cannot encode the prompt: {error}") from None

    def _too_long(self, tokens: str) -> Refusal:
        return Refusal(
            f"the prompt has {tokens} tokens; with one to answer at most {self.context:,} fit"
            " (setting INFLASH_CONTEXT, and the model's own limit)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_tokenizer(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    # What a training set-up may have left in the file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
