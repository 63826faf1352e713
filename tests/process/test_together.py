"""Requests that run together: each gets the tokens that it gets alone, whoever comes or goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.bench.clients import measure_clients
from common.trace.run import load_run
from common.trace.verdict import CAUSES, judge
from inflash import Client, Prefill, RequestFailed
from scripts.trace import pieces
from tests.conftest import Made, serving

PROMPTS = [[5, 6], [7, 8, 9], list(range(3, 80)), [11], [12, 13], [14] * 20]
LONG_S = 60.0


class Asked(threading.Thread):
    """A client of its own that asks once; `tokens`, `told` and `reason` are what came."""

    def __init__(self, run_dir: Path, prompt: list[int], tokens: int, **options: Any):
        super().__init__()
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.told: list[Prefill] = []
        self.reason: str | None = None
        self.failed: RequestFailed | None = None
        self.stats: Any = None
        self.cancel_after = options.pop("cancel_after", None)
        self.cancel_prompt = options.pop("cancel_prompt", False)
        self._run_dir, self._prompt = run_dir, prompt
        self._options = {"max_new_tokens": tokens, "ignore_eos": True} | options
        self.start()

    def run(self) -> None:
        with Client(self._run_dir) as client, contextlib.ExitStack() as stack:

            def tell(prefill: Prefill) -> None:
                self.told.append(prefill)
                if self.cancel_prompt:
                    answer.cancel()

            answer = client.generate(self._prompt, on_prefill=tell, **self._options)
            stack.callback(answer.cancel)
            try:
                for token in answer:
                    self.tokens.append(token.id)
                    self.times.append(time.monotonic())
                    if len(self.tokens) == self.cancel_after:
                        answer.cancel()
            except RequestFailed as failure:
                self.failed = failure
            self.reason, self.stats = answer.finish_reason, answer.stats


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("variant", "dtype"), [("llama-gqa", "float32"), ("opt", "float16")], ids=["llama", "opt"]
)
def test_each_gets_the_tokens_that_it_gets_alone(
    made: Made, run_dir: Path, variant: str, dtype: str
) -> None:
    store = made.store(variant, dtype)
    with serving(store, run_dir, cache="30%", predictor="exact", sequences="2") as client:

        def alone(prompt: list[int], tokens: int = 60) -> list[int]:
            answer = client.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
            return [token.id for token in answer]

        expected = [alone(prompt) for prompt in PROMPTS]
        first = [Asked(run_dir, prompt, 60) for prompt in PROMPTS[:3]]
        cancelled = Asked(run_dir, [40, 41], 400, cancel_after=5)
        until(lambda: len(first[0].tokens) > 3)  # others join, and one has left
        late = [Asked(run_dir, prompt, 60) for prompt in PROMPTS[3:]]
        for asked in (*first, *late, cancelled):
            asked.join(LONG_S)
        assert [asked.tokens for asked in (*first, *late)] == expected
        assert cancelled.reason == "cancelled"
        assert 5 <= len(cancelled.tokens) < 400
        counters = client.status()["services"]["compute"]["counters"]
        tokens = sum(len(asked.tokens) for asked in (*first, *late)) + 6 * 60
        assert counters["steps"] < tokens, "steps were shared"
        clients_are_measured(run_dir)
        queue = client.status()["queue"]
        assert (queue["running"], queue["room_taken_tokens"]) == (0, 0)
    the_trace_adds_up(run_dir)


def clients_are_measured(run_dir: Path) -> None:
    rows = measure_clients(run_dir, [1, 3], 12, prompts=PROMPTS)
    assert [(row.n, row.answers, row.tokens) for row in rows] == [(1, 1, 12), (3, 3, 36)]
    for row in rows:
        assert (row.lost, row.doubled, row.different) == (0, 0, 0)
        assert 0 < row.slowest_share <= 1
        assert row.tokens_per_s > 0
        assert row.memory_peak_bytes is None or row.memory_start_bytes <= row.memory_peak_bytes


def the_trace_adds_up(run_dir: Path) -> None:
    run = load_run(run_dir)
    assert any(token.by_cause["others"] for token in run.tokens), "a prompt came in between"
    for token in run.tokens:
        assert sum(token.by_cause.values()) == pytest.approx(token.ns, rel=0.02)
    together = [t for t in run.tokens if any(layer.counts["rows"] > 1 for layer in t.layers)]
    assert {t.request for t in together if t.index} != {together[0].request}
    assert judge(run).cause in CAUSES
    assert list(pieces(run.only("last"), 80))


def test_a_decode_goes_on_between_the_blocks_of_a_long_prompt(made: Made, run_dir: Path) -> None:
    store = made.store("llama-gqa")
    options = {"cache": "30%", "sequences": "2", "block": "16", "context": "512"}
    with serving(store, run_dir, **options):
        decoding = Asked(run_dir, [5, 6], 300)
        until(lambda: len(decoding.tokens) > 2)
        prompt = Asked(run_dir, list(range(5, 55)) * 8, 3)  # 25 blocks
        began = time.monotonic()
        prompt.join(LONG_S)
        decoding.join(LONG_S)
        meanwhile = [at for at in decoding.times if began < at < prompt.times[0]]
        assert len(meanwhile) > 10, "a token for almost every block"
        assert decoding.stats.decode_others_s > 0
        assert prompt.reason == "length"


def test_prompts_that_wait_share_a_block(made: Made, run_dir: Path) -> None:
    """They come while another is computed. One is cancelled in the middle of the block: its client
    hears within a layer, and the others get what they get alone."""
    prompts = [[at, *range(9, 8 + count)] for at, count in ((3, 50), (4, 20), (5, 70), (6, 30))]
    options = {"predictor": "exact", "context": "256", "sequences": "4", "block": "128"}
    with serving(made.store("opt"), run_dir, **options) as client:

        def alone(prompt: list[int]) -> list[int]:
            answer = client.generate(prompt, max_new_tokens=2, ignore_eos=True)
            return [token.id for token in answer]

        expected = [alone(prompt) for prompt in prompts]
    slow = {"slow": "reads:100%:100ms", "cache": "30%"}  # a layer: longer than PREFILLING_EVERY_S
    with serving(made.store("opt"), run_dir, **options | slow) as client:

        def running(count: int) -> Callable[[], bool]:
            return lambda: client.status()["queue"]["running"] == count

        asked = [Asked(run_dir, list(range(7, 132)), 2)]
        for at, prompt in enumerate(prompts):
            until(running(at + 1))
            asked.append(Asked(run_dir, prompt, 2, cancel_prompt=at == 0))
        for each in asked:
            each.join(LONG_S)
        _, cancelled, *others = asked
        assert (cancelled.reason, cancelled.tokens) == ("cancelled", [])
        assert [each.tokens for each in others] == expected[1:]
        # As many as there is room for in a block of 128 tokens, the last one in part.
        assert [each.told[0].block for each in asked[1:4]] == [50, 20, 58]
        assert {t.layers_done for t in cancelled.told} <= {1, 2}, "within a layer"


def test_who_comes_when_a_block_has_just_begun_joins_it(made: Made, run_dir: Path) -> None:
    prompts = [[at, *range(9, 8 + count)] for at, count in ((3, 50), (4, 20))]
    options = {"predictor": "exact", "context": "256", "sequences": "4", "block": "128"}
    with serving(made.store("opt"), run_dir, slow="reads:100%:400ms", **options) as client:
        asked = [Asked(run_dir, prompts[0], 2)]
        until(lambda: client.status()["queue"]["running"] == 1)
        asked.append(Asked(run_dir, prompts[1], 2))
        for each in asked:
            each.join(LONG_S)
        assert [len(each.tokens) for each in asked] == [2, 2]

        def counter(name: str) -> int:
            count: int = client.status()["services"]["compute"]["counters"].get(name, 0)
            return count

        until(lambda: counter("tokens") == 4)
        assert counter("steps") == 2, "a block of both prompts, and a token of both"
        alone = [list(client.generate(p, max_new_tokens=2, ignore_eos=True)) for p in prompts]
    assert [each.tokens for each in asked] == [[token.id for token in ids] for ids in alone]
    run = load_run(run_dir)
    for token in run.tokens:
        assert sum(token.by_cause.values()) == pytest.approx(token.ns, rel=0.02)
