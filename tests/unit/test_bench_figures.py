"""Figures of runs: medians, spreads, sums over requests, and runs that failed."""

from __future__ import annotations

from typing import Any

import pytest

from common.bench.contenders import Run
from common.bench.figures import spread, summarise, summarise_inflash


def run_of(result: dict[str, Any] | None, **fields: Any) -> Run:
    given = {"problem": "", "peak_bytes": 5, "swap_bytes": None, "why_not_enforced": "",
             "warm_bytes": 0}  # fmt: skip
    return Run(result=result, **given | fields)


def result_of(times: list[float], bytes_read: int | None = 0) -> dict[str, Any]:
    return {"ms_per_token": times, "bytes_read": bytes_read, "prefill_ms": 1.0, "load_ms": 2.0,
            "major_faults": 3, "version": "1", "note": "n"}  # fmt: skip


def request_of(kind: str, times: list[float], **stats: float) -> dict[str, Any]:
    zero = dict.fromkeys(
        ("decode_bytes_read", "decode_hits", "decode_misses", "decode_fired", "decode_late_fired",
         "decode_wasted_bytes", "decode_read_s", "decode_stall_s", "decode_s"), 0.0,
    )  # fmt: skip
    counts = {"prompt_tokens": 10, "new_tokens": len(times) + 1}
    timed = result_of(times, 100)
    return {"kind": kind, "timed": timed, "stats": zero | counts | stats, "waits": None}


def test_spread_of_a_value_and_of_several() -> None:
    one = spread([3.0])
    assert (one["median"], one["quartiles"], one["min"], one["max"], one["count"]) == (
        3.0, [3.0, 3.0], 3.0, 3.0, 1,
    )  # fmt: skip
    several = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert several["median"] == 3.0
    assert several["quartiles"] == [2.0, 4.0]
    assert (several["min"], several["max"], several["count"]) == (1.0, 100.0, 5)


def test_rounds_are_one_sample_and_the_peak_is_the_largest() -> None:
    runs = [
        run_of(result_of([1.0, 3.0], 100), peak_bytes=7),
        run_of(result_of([5.0], 50), peak_bytes=9, warm_bytes=4, why_not_enforced="no root"),
    ]
    figures = summarise(runs)
    assert figures["ms_per_token"] == 3.0
    assert figures["round_ms"] == [2.0, 5.0]
    assert figures["bytes_per_token"] == 50
    assert (figures["peak_bytes"], figures["warm_bytes"]) == (9, 4)
    assert figures["not_enforced"] == "no root"
    assert figures["major_faults"] == 2


def test_what_is_not_counted_is_none_and_not_zero() -> None:
    figures = summarise([run_of(result_of([1.0], None), peak_bytes=None)])
    assert figures["bytes_per_token"] is None
    assert figures["peak_bytes"] is None


def test_a_failure_in_any_round_is_the_contenders() -> None:
    good, bad = run_of(result_of([1.0])), run_of(None, problem="it was killed")
    assert summarise([good, bad]) == {"failed": "it was killed"}
    assert summarise_inflash([good, bad]) == {"failed": "it was killed"}
    assert "failed" in summarise([])


def test_requests_are_summed_by_kind_and_rotating_ones_are_the_headline() -> None:
    cold = request_of("cold", [50.0], decode_hits=1, decode_misses=3)
    stats = {"decode_hits": 6, "decode_misses": 2, "decode_fired": 4, "decode_bytes_read": 4000,
             "decode_read_s": 0.002}  # fmt: skip
    first = request_of("rotating", [10.0, 20.0], **stats, decode_stall_s=0.001)
    second = request_of("rotating", [30.0, 40.0], **stats)
    first["waits"] = {"predictor_ms": 1.0, "queue_ms": 2.0, "flash_ms": 3.0, "read_bytes": 10.0}
    result = result_of([10.0, 20.0, 30.0, 40.0]) | {
        "requests": [cold, first, second], "memory_bytes": 1, "cache_bytes": 2,
        "cache_share": 0.5, "process_peak_bytes": {},
    }  # fmt: skip
    figures = summarise_inflash([run_of(result)])
    assert list(figures["requests"]) == ["cold", "rotating"]
    assert figures["requests"]["cold"]["hit_rate"] == 0.25
    assert figures["hit_rate"] == 0.75
    assert figures["named_per_token"] == 4.0
    assert figures["fired_per_token"] == 2.0
    assert figures["own_bytes_per_token"] == 2000
    assert figures["read_ms"] == pytest.approx(1.0)
    assert figures["stall_ms"] == pytest.approx(0.25)
    assert figures["bytes_per_s_while_reading"] == pytest.approx(2e6)
    assert figures["context_tokens"] == 11.5
    assert figures["bytes_per_read"] == 10.0
    assert figures["waits_ms"] == {"predictor": 1.0, "queue": 2.0, "flash": 3.0}
