"""Several clients at once: what they get together, and what the slowest of them gets.

No torch here, no numpy: the cap that a bench sets counts the process that asks, too.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from inflash import Client
from inflash._errors import InflashError

PROMPT_TOKENS = 16
SEED = 11
CLIENT_S = 600.0  # a server that does not say for so long that it is alive


@dataclass(frozen=True)
class Together:
    """What `n` clients got that asked at the same time."""

    n: int
    tokens_per_s: float  # of all, from the first request to the last token, prompts included
    slowest_share: float  # tokens/s of the slowest ÷ their mean: 1 is as much for each


def measure_clients(
    run_dir: Path, n: int, tokens: int, prompt_tokens: int = PROMPT_TOKENS
) -> dict[str, Any]:
    """`Together` as JSON has it, of `n` clients of the server in `run_dir`, each with a prompt of
    its own, who ask at once and want `tokens` tokens.

    Tokens are given, not chosen, so that texts neither end nor meet. `UserError` if a client did
    not get exactly its own.
    """
    with Client(run_dir, timeout=CLIENT_S) as client:
        vocabulary = int(client.status()["model"]["vocabulary"])
    draw = random.Random(f"{SEED} {n}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    start = threading.Barrier(n)
    asking = [_Asking(run_dir, ids(prompt_tokens), ids(tokens), start) for _ in range(n)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    if problems := [one.problem for one in asking if one.problem]:
        raise UserError(f"one of {n} clients: {problems[0]}")
    if not all(one.ended for one in asking):
        raise UserError(f"not all of {n} clients asked within {CLIENT_S:.0f} s (limit CLIENT_S)")
    took_s = max(one.ended for one in asking) - min(one.began for one in asking)
    speeds = [tokens / (one.ended - one.began) for one in asking]
    return asdict(Together(n, n * tokens / took_s, min(speeds) * n / sum(speeds)))


class _Asking(threading.Thread):
    """One client: it connects, waits for the others, asks, and takes its answer."""

    def __init__(
        self, run_dir: Path, prompt: list[int], answer: list[int], start: threading.Barrier
    ):
        super().__init__(name="client", daemon=True)
        self._run_dir, self._prompt, self._answer, self._barrier = run_dir, prompt, answer, start
        self.problem = ""
        self.began = self.ended = 0.0

    def run(self) -> None:
        try:
            with Client(self._run_dir, timeout=CLIENT_S) as client:
                self._barrier.wait(CLIENT_S)
                self._ask(client)
        except threading.BrokenBarrierError:
            pass  # another one could not connect, and says why
        except InflashError as error:
            self.problem = str(error)
            self._barrier.abort()  # else the others wait for one that does not come

    def _ask(self, client: Client) -> None:
        self.began = time.perf_counter()
        answer = client.generate(
            self._prompt,
            max_new_tokens=len(self._answer),
            forced=self._answer,
            ignore_eos=True,
        )
        got = [token.id for token in answer]
        self.ended = time.perf_counter()
        if got != self._answer:
            self.problem = (
                f"it got {len(got)} tokens of {len(self._answer)} ({answer.finish_reason}), or not"
                " its own: give the server a context that has room for prompt and answer"
            )
