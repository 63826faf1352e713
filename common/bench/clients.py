"""Several clients at once: what they get together, whether each gets its share, and whether memory
grows or a token is lost. Against a server that runs."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.bench.processes import resident_bytes
from inflash import Client

PROMPTS = (
    "def ", "import os\nimport sys\n", "class Reader:\n    def ", "for name in names:\n",
    "# A test of\n", "try:\n    ", "async def main(", "if __name__ == ",
)  # fmt: skip
"""Each client has its own; those of a demo store know Python."""
PROMPT_TOKENS = 16  # of a prompt that is drawn
SEED = 1  # of the tokens: every run has the same

ANSWER_S = 600.0  # longest wait for an answer
MEMORY_EVERY_S = 1.0


def draw(vocabulary: int, clients: int, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """A prompt and an answer for each client, ids below `vocabulary`; the same each time."""
    random = np.random.default_rng(SEED)
    prompts = random.integers(0, vocabulary, (clients, PROMPT_TOKENS)).tolist()
    return prompts, random.integers(0, vocabulary, (clients, tokens)).tolist()


@dataclass(frozen=True)
class Together:
    """What so many clients got. `window_s` is the time in which all of them were served: until the
    first of them had all its answers."""

    n: int
    window_s: float
    tokens_per_s: float  # of all together, in the window
    slowest_share: float  # tokens of the slowest client ÷ what each would have of equal parts
    first_token_s_max: float  # longest wait for an answer's first token
    answers: int
    tokens: int
    lost: int  # tokens that were asked for and did not come
    doubled: int  # tokens beyond those that were asked for
    different: int  # answers that differ from the one that their prompt gets alone
    memory_start_bytes: int | None  # of all processes; None: the system does not say
    memory_end_bytes: int | None
    memory_peak_bytes: int | None

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class _Asking:
    """One client, in a thread of its own."""

    run_dir: Path
    prompt: str | Sequence[int]
    expected: list[int]
    tokens: int
    given: bool  # the expected tokens are given, not chosen
    until: float  # asks again before this moment
    times: list[float] = field(default_factory=list)  # of tokens
    firsts: list[float] = field(default_factory=list)  # seconds until an answer's first token
    answers: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    error: Exception | None = None

    def run(self, begin: threading.Barrier) -> None:
        try:
            with Client(self.run_dir, ANSWER_S) as client:
                begin.wait(ANSWER_S)
                while True:
                    self._ask(client)
                    if time.monotonic() >= self.until:
                        return
        except threading.BrokenBarrierError:
            pass  # another one could not connect, and says why
        except Exception as error:  # told by the thread that started this one
            self.error = error
            begin.abort()  # else the others wait for one that does not come

    def _ask(self, client: Client) -> None:
        asked, ids = time.monotonic(), list[int]()
        forced = self.expected if self.given else ()
        answer = client.generate(
            self.prompt, max_new_tokens=self.tokens, ignore_eos=True, forced=forced
        )
        for token in answer:
            self.times.append(time.monotonic())
            if not ids:
                self.firsts.append(self.times[-1] - asked)
            ids.append(token.id)
        self.answers += 1
        self.lost += max(self.tokens - len(ids), 0)
        self.doubled += max(len(ids) - self.tokens, 0)
        self.different += ids != self.expected


def measure_clients(
    run_dir: Path,
    counts: Sequence[int],
    tokens: int,
    seconds: float = 0.0,
    prompts: Sequence[str | Sequence[int]] = PROMPTS,
    given: Sequence[list[int]] = (),
) -> list[Together]:
    """A row for each number of clients in `counts`. Each client asks for `tokens` tokens, greedily,
    and again until `seconds` have passed; before that each prompt is answered alone, which warms
    the cache. Or each prompt's answer is `given`, that of its place.

    Raises inflash's errors, those of a client's thread too.
    """
    used = [prompts[i % len(prompts)] for i in range(max(counts))]
    with Client(run_dir, ANSWER_S) as client:
        pids = {name: s["pid"] for name, s in client.status()["services"].items()}
        answers = given or [_ids(client, prompt, tokens) for prompt in used]
    asked = list(zip(used, answers, strict=True))
    rows = []
    for n in counts:
        until = time.monotonic() + seconds
        asking = [_Asking(run_dir, *asked[i], tokens, bool(given), until) for i in range(n)]
        rows.append(_together(asking, pids.values()))
    return rows


def _ids(client: Client, prompt: Any, tokens: int) -> list[int]:
    answer = client.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
    return [token.id for token in answer]


def _together(asking: Sequence[_Asking], pids: Iterable[int]) -> Together:
    n = len(asking)
    begin = threading.Barrier(n + 1)
    threads = [threading.Thread(target=a.run, args=(begin,), daemon=True) for a in asking]
    for thread in threads:
        thread.start()
    memory = [resident_bytes(pids)]
    with contextlib.suppress(threading.BrokenBarrierError):
        begin.wait(ANSWER_S)
    began = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.1)
        if time.monotonic() - began >= MEMORY_EVERY_S * len(memory):
            memory.append(resident_bytes(pids))
    for error in (a.error for a in asking if a.error):
        raise error
    memory.append(resident_bytes(pids))
    end = min(a.times[-1] for a in asking)
    served = [sum(at <= end for at in a.times) for a in asking]
    known = [size for size in memory if size is not None]
    return Together(
        n=n,
        window_s=end - began,
        tokens_per_s=sum(served) / (end - began),
        slowest_share=min(served) * n / sum(served),
        first_token_s_max=max(max(a.firsts) for a in asking),
        answers=sum(a.answers for a in asking),
        tokens=sum(len(a.times) for a in asking),
        lost=sum(a.lost for a in asking),
        doubled=sum(a.doubled for a in asking),
        different=sum(a.different for a in asking),
        memory_start_bytes=memory[0],
        memory_end_bytes=memory[-1],
        memory_peak_bytes=max(known, default=None),
    )
