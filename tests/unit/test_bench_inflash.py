"""The contender inflash: what it asks, which requests count, what its log says it waited for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from common.bench.inflash import (
    Answered,
    add_up,
    headline,
    main,
    make_questions,
    waits_by_request,
)
from common.bench.processes import bytes_read, major_faults, peak_bytes
from common.bench.rivals.program import Options, Timed
from common.spans import COUNTS, Span
from inflash import Stats

IDS = 300


def options(prompts: int, warm: bool, tokens: int = 4) -> Options:
    own = argparse.Namespace(prompts=prompts, warm=warm, set=[], clients=[])
    return Options(Path("store"), [5, 6, 7], tokens, 1, own)


def test_requests_are_cold_then_warm_then_new_ones() -> None:
    questions = make_questions(options(3, warm=True), IDS)
    assert [one.kind for one in questions] == ["cold", "warm", "rotating", "rotating"]
    cold, warm, first, second = questions
    assert cold.prompt == [5, 6, 7]
    assert (cold.prompt, cold.answer) == (warm.prompt, warm.answer)
    assert len({tuple(one.prompt) for one in (cold, first, second)}) == 3
    assert len({tuple(one.answer) for one in (cold, first, second)}) == 3
    for one in questions:
        assert len(one.prompt) == 3
        assert len(one.answer) == 5, "one comes with the prompt, four are timed"
        assert all(0 <= token < IDS for token in one.answer)
    assert make_questions(options(3, warm=True), IDS) == questions, "every run asks the same"
    assert [one.kind for one in make_questions(options(1, warm=False), IDS)] == ["cold"]


def answered(kind: str, times: list[float], bytes_read: int | None) -> Answered:
    stats = dict.fromkeys(Stats.__dataclass_fields__, 0)
    return Answered(kind, Timed(9.0, times, bytes_read, 1, [1]), Stats(**stats))  # type: ignore[arg-type]


def test_figures_are_of_the_rotating_prompts() -> None:
    cold = answered("cold", [50.0], 900)
    rotating = [answered("rotating", [1.0, 2.0], 10), answered("rotating", [3.0], 20)]
    assert headline([cold, *rotating]) == rotating
    assert headline([cold]) == [cold]
    timed = add_up(rotating)
    assert timed.ms_per_token == [1.0, 2.0, 3.0]
    assert (timed.bytes_read, timed.major_faults) == (30, 2)
    assert add_up([cold, answered("rotating", [1.0], None)]).bytes_read is None


def test_waits_are_those_of_decode_steps_by_request() -> None:
    def span(request: int, step: int, rows: int, us: int, reads: int) -> Span:
        counts = {"rows": rows, "reads": reads, "bytes_read": 4096 * reads,
                  "predictor_ns": us * 1000, "queue_ns": 2 * us * 1000,
                  "flash_ns": 3 * us * 1000}  # fmt: skip
        return Span("layer", request, step, 0, 0, 1, tuple(counts.get(c, 0) for c in COUNTS))

    spans = [
        Span("sample", 1, 10, -1, 0, 1, ()),
        span(1, 10, 64, 1_000_000, 9),
        span(1, 11, 1, 1000, 1),
        span(1, 11, 1, 1000, 1),
        span(1, 12, 1, 4000, 0),
        span(2, 13, 1, 500, 0),
    ]
    first, second = waits_by_request(spans)
    assert (first.predictor_ms, first.queue_ms, first.flash_ms) == (3.0, 6.0, 9.0)
    assert first.read_bytes == 4096
    assert (second.predictor_ms, second.read_bytes) == (0.5, None)


def test_the_kernel_counts_this_process() -> None:
    pid = os.getpid()
    peak = peak_bytes(pid)
    assert peak is not None
    assert peak > 10_000_000
    assert major_faults([pid]) >= 0
    counted = bytes_read([pid])
    assert counted is None or counted >= 0
    gone = 2**22 + 1  # beyond the largest process id
    assert (peak_bytes(gone), bytes_read([gone]), major_faults([gone])) == (None, None, 0)


def test_a_setting_needs_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    from common.bench import inflash

    given = ["store", "--tokens", "1", "--prompt-ids-file", "f", "--set", "cache"]
    with pytest.raises(SystemExit):
        main(inflash.contend, {}, given, inflash._add_arguments)
    assert "write KEY=VALUE" in capsys.readouterr().err
