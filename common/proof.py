"""The proof that a server's answers equal the reference model's: same prompts, logits beside
logits.

The server generates greedily and sends the logits of every token. The reference, transformers' own
model with its own FFN in float32 from the same weights, then reads prompt and answer in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.model.reference import load_reference, pack_like
from common.store.store import Store
from inflash import Client

# Largest difference of a logit, relative to the largest logit of the reference.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
# Packed rows are multiplied with a vector that is rounded to int16 (common/integer_dot.py).
TOLERANCE_PACKED = 1e-3


@dataclass(frozen=True)
class Answer:
    """What a server said to a prompt: token ids, and logits float32 [tokens, vocabulary]."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True)
class Proof:
    """One prompt's comparison. `first_difference` counts answer tokens from 0; None: none."""

    prompt_tokens: int
    tokens: int
    largest_difference: float  # relative
    first_difference: int | None
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.first_difference is None and self.largest_difference <= self.tolerance


def ask(client: Client, prompt: Sequence[int], tokens: int) -> Answer:
    """The server's greedy answer of `tokens` tokens, with logits."""
    generation = client.generate(
        list(prompt), max_new_tokens=tokens, temperature=0, ignore_eos=True, logits=True
    )
    ids, rows = [], []
    for token in generation:
        ids.append(token.id)
        assert token.logits is not None
        rows.append(torch.frombuffer(bytearray(token.logits), dtype=torch.float32))
    return Answer(tuple(prompt), tuple(ids), torch.stack(rows))


class Reference:
    """The reference model of a checkpoint, in float32. With a packed `store`, or `resident`, it has
    the weights that the packed ones stand for."""

    def __init__(self, src: Path, dtype: str, store: Store | None = None, resident: str = "float"):
        self._model = load_reference(src, torch.float32)
        if store is not None:
            pack_like(self._model, store, resident)
        self._tolerance = TOLERANCE[dtype]
        if store is not None and (store.geometry.packed or resident != "float"):
            self._tolerance = max(self._tolerance, TOLERANCE_PACKED)

    def check(self, answer: Answer) -> Proof:
        """Compares every token's logits, and the token itself with the reference's top token.

        In half precision a token may differ where the reference's top two are closer than the
        tolerance; in float32 it may not.
        """
        tokens = torch.tensor([*answer.prompt, *answer.tokens[:-1]])
        with torch.inference_mode():
            logits = self._model(tokens[None]).logits[0, len(answer.prompt) - 1 :].float()
        scale = logits.abs().amax(dim=1)
        difference = ((answer.logits - logits).abs().amax(dim=1) / scale).max()
        top = logits.topk(2, dim=1).values
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        near = self._tolerance * scale if self._tolerance > 1e-3 else torch.zeros_like(scale)
        differs = (top[:, 0] - chosen > near).nonzero().squeeze(1)
        return Proof(
            prompt_tokens=len(answer.prompt),
            tokens=len(answer.tokens),
            largest_difference=float(difference),
            first_difference=int(differs[0]) if len(differs) else None,
            tolerance=self._tolerance,
        )
