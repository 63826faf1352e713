"""The report: its sentences, tables and picture say what the figures bear, and what is missing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.bench.figures import spread, summarise, summarise_inflash
from common.bench.names import NOT_ASKED
from common.bench.picture import draw_report
from common.bench.report import verdicts
from common.bench.tables import tables
from tests.unit.test_bench_figures import request_of, result_of, run_of

PNG = b"\x89PNG\r\n\x1a\n"


def served(times: list[float]) -> dict[str, Any]:
    requests = [request_of(kind, times, decode_s=sum(times) / 1e3) for kind in ("cold", "rotating")]
    own = {"requests": requests, "memory_bytes": 1, "cache_bytes": 2, "cache_share": 0.5,
           "process_peak_bytes": {}}  # fmt: skip
    return summarise_inflash([run_of(result_of(times, 100) | own)])


def rival(times: list[float], **fields: Any) -> dict[str, Any]:
    return summarise([run_of(result_of(times), **fields)])


@pytest.fixture
def found() -> dict[str, Any]:
    """A report in which everything is there, and all goes well."""
    return {
        "shape": "opt-6.7b",
        "layers": 2,
        "neurons": 50,
        "tokens": 32,
        "cap_bytes": 7_000_000_000,
        "checkpoint_bytes": 13_000_000_000,
        "planted": [{"what": "fire", "published": 0.033, "planted": None, "measured": 0.0312}],
        "contenders": {
            "inflash": served([100.0, 110.0, 120.0]),
            "accelerate": rival([9000.0, 9100.0]),
            "llama_cpp_mmap": rival([4000.0, 4400.0]),
            "llama_cpp_ram": rival([50.0, 55.0]),
        },
        "serial": served([150.0, 160.0, 170.0]),
        "serial_ms": 160.0,
        "overlap_efficiency": 0.75,
        "floors": {
            "read_ms": 60.0, "compute_ms": 93.0, "drive_bytes_per_s": 1.5e9,
            "memory_bytes_per_s": 25e9,
            "memory": {"last_level_cache_bytes": 1 << 20, "matrices_bytes": 1 << 30},
        },
        "machine": {"load_before": 0.1},
        "rounds": 3,
    }  # fmt: skip


def said(found: dict[str, Any]) -> str:
    return "\n".join(verdicts(found))


def shown(found: dict[str, Any]) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        for table in tables(found):
            console.print(table)
    return captured.get()


def test_what_is_found_is_said_with_its_spread(found: dict[str, Any]) -> None:
    text = said(found)
    assert "110.0 ms (105.0 to 115.0) a token under a cap of 7.0 GB" in text
    assert "it is 38.2 times as fast as llama.cpp, mmap under the same cap" in text
    assert "it takes 2.1 times as long as llama.cpp, all in RAM without a cap" in text
    assert "a token takes 1.2 times the larger, the products" in text
    assert "160.0 ms without look-ahead, 110.0 with it: 75% of what overlap could save" in text
    for word in ("absent", "failed", "above the cap", "something else", "enforced"):
        assert word not in text


def test_no_ratio_where_the_spreads_overlap(found: dict[str, Any]) -> None:
    found["contenders"]["accelerate"] = rival([90.0, 100.0, 130.0])
    assert "within the spread it is as fast as accelerate" in said(found)


def test_what_a_reader_must_know_is_said(found: dict[str, Any]) -> None:
    found["contenders"]["accelerate"] = {"absent": "accelerate is not installed"}
    found["contenders"]["llama_cpp_ram"] = {"failed": "it was killed"}
    found["contenders"]["llama_cpp_mmap"] = rival(
        [4000.0], peak_bytes=8_000_000_000, swap_bytes=5_000, warm_bytes=6_000,
        why_not_enforced="no memory cgroup could be made",
    )  # fmt: skip
    found["machine"]["load_before"] = 3.0
    found["rounds"] = 2
    found["floors"]["memory"]["last_level_cache_bytes"] = 1 << 30
    text = said(found)
    for sentence in (
        "absent: accelerate, disk offload: accelerate is not installed",
        "failed: llama.cpp, all in RAM: it was killed",
        "llama.cpp, mmap: its peak, 8.0 GB, is above the cap",
        "llama.cpp, mmap: 5.0 kB of it were swapped out",
        "llama.cpp, mmap: 6.0 kB of its files could not be made cold",
        "llama.cpp, mmap: no memory cgroup could be made",
        "a load of 3.0 before the first run",
        "rounds: 2: what the machine did",
        "may be the processor cache's",
    ):
        assert sentence in text


def test_a_peak_without_a_cap_is_no_fault(found: dict[str, Any]) -> None:
    found["contenders"]["llama_cpp_ram"] = rival([50.0], peak_bytes=14_000_000_000)
    assert "above the cap" not in said(found)


def test_a_floor_that_is_reached_leaves_nothing_to_save(found: dict[str, Any]) -> None:
    found["overlap_efficiency"] = None
    assert "nothing can be saved" in said(found)


def add_studies(found: dict[str, Any]) -> dict[str, Any]:
    row = {"spread_ms": spread([1.0, 2.0]), "peak_bytes": None, "bytes_per_token": 5e6,
           "bytes_per_s_while_reading": None, "read_ms": None, "stall_ms": None}  # fmt: skip
    found["ablation"] = [
        {"step": "none", "change": "", "ms_per_token": 900.0, **row},
        {"step": "window", "change": "", "ms_per_token": 950.0, "gain": 0.947,
         "verdict": "slower", **row},
        {"step": "bundling", "change": "", "absent": "a bundle is too small"},
        {"step": "decay", "change": "", "failed": "it was killed"},
    ]  # fmt: skip
    found["growth"] = [
        {"shape": "opt-125m", "checkpoint_bytes": 250e6, "ms_per_token": 9.0, **row},
        {"shape": "opt-1.3b", "checkpoint_bytes": 2.6e9, "failed": "it was killed"},
    ]
    found["context_cost"] = [{"prompt_tokens": 2000, "ms_per_token": 9.0, **row}]
    found["everything_cached"] = {
        "ms_per_token": 9.0, "processes_us_per_layer": 210.4, "plain": {"absent": "no torch"}, **row
    }  # fmt: skip
    return found


def add_packed(found: dict[str, Any]) -> dict[str, Any]:
    """Every contender, a long prompt, several clients."""
    plain = found["contenders"]
    for figures in (plain["inflash"], found["serial"]):
        figures |= {"fired_per_token": 3.3, "named_per_token": 10.0}
    note = "a Llama of the same shape"
    plain |= {
        "inflash_int8": served([60.0, 66.0]) | {"fired_per_token": 3.2, "named_per_token": 9.9},
        "inflash_int4": {"failed": "it was killed"},
        "llama_cpp_q8_0": rival([1000.0, 1100.0]) | {"note": f"{note}; weights in Q8_0"},
        "llama_cpp_q4_0": rival([250.0, 270.0]) | {"note": f"{note}; weights in Q4_0"},
    }
    plain["llama_cpp_mmap"]["note"] = note
    found["planted"][0] |= {"measured_int8": 0.0311, "measured_int4": 0.0307}

    def timed(ms: float) -> dict[str, Any]:
        return {"prefill_512_ms": ms, "spread_ms": spread([ms]), "peak_bytes": 7_000_000_000}

    found["prefill"] = {"tokens": 512, "contenders": {
        "inflash": timed(20_000.0), "inflash_int8": timed(15_000.0),
        "accelerate": {"failed": "it was not done"}, "llama_cpp_mmap": timed(26_000.0),
        "llama_cpp_q8_0": timed(12_000.0),
    }}  # fmt: skip
    found["clients"] = [
        {"n": n, "tokens_per_s": speed, "slowest_share": share, "peak_bytes": 6_500_000_000}
        for n, speed, share in ((1, 1.25, 1.0), (4, 3.5, 0.93))
    ]
    found["packed_clients"] = {
        "inflash_int8": [row | {"tokens_per_s": 3.0 * row["n"]} for row in found["clients"]],
        "inflash_int4": [{"n": n, "failed": "it was killed"} for n in (1, 4)],
    }
    return found


def test_packed_contenders_are_beside_ours_and_beside_their_peers(found: dict[str, Any]) -> None:
    text = said(add_packed(found))
    for sentence in (
        "inflash, int8: 63.0 ms (61.5 to 64.5) a token under a cap of 7.0 GB",
        "it is 1.7 times as fast as inflash with all numbers in 16 bits",
        "in it 3.2% of the neurons fired and 9.9% were named, where in 16 bits it was 3.3% and 10",
        "it is 16.7 times as fast as llama.cpp Q8_0, mmap under the same cap",
        "it is 2.4 times as fast as llama.cpp Q4_0, mmap under the same cap",
        "failed: inflash, int4: it was killed",
        "llama.cpp: a Llama of the same shape; weights in Q8_0",
    ):
        assert sentence in text
    assert text.count("llama.cpp: a Llama of the same shape") == 2, "F16's says no more"
    order = [line for line in text.splitlines() if "Q4_0, mmap under" in line or "int8: 63" in line]
    assert "Q4_0" in order[0], "int4 failed: the float one stands in"


def test_a_long_prompt_and_clients_are_said_and_shown(found: dict[str, Any]) -> None:
    text = said(add_packed(found))
    for sentence in (
        "a prompt of 512 tokens: inflash takes 20.00 s to its first token; it is 1.3 times as fast"
        " as llama.cpp, mmap (26.00 s)",
        "inflash, int8 takes 15.00 s to its first token; it takes 1.2 times as long as llama.cpp",
        "a prompt of 512 tokens: accelerate, disk offload failed: it was not done",
        "inflash: 1 client: 1.25 tokens/s together",
        "4 clients: 3.50 tokens/s together, 2.80 times what 1 got; the slowest had 0.93 of their",
        "inflash, int8: 4 clients: 12.00 tokens/s together, 4.00 times what 1 got",
        "inflash, int4: 1 client failed: it was killed",
    ):
        assert sentence in text
    table = shown(found)
    for cell in (
        "in int8",
        "3.1%",
        "25.6",
        "2.80×",
        "12.0",
        "0.93",
        "a prompt of 512 tokens, cap 7.0",
    ):
        assert cell in table
    found["clients"] = [{"n": n, "failed": "it was killed"} for n in (1, 4)]
    assert said(found).count("4 clients") == 1, "int8's"
    assert "inflash: 1 client failed: it was killed" in said(found)
    assert "failed" in shown(found)


def test_who_was_not_asked_for_is_not_shown(found: dict[str, Any]) -> None:
    found["contenders"]["inflash_int8"] = {"absent": NOT_ASKED}
    found["contenders"]["llama_cpp_q8_0"] = {"absent": NOT_ASKED}
    assert "int8" not in said(found) + shown(found)
    assert "Q8_0" not in said(found) + shown(found)


def test_studies_are_said_and_shown(found: dict[str, Any]) -> None:
    text = said(add_studies(found))
    for sentence in (
        "window is not seen to help here: 0.95 times as fast as the step before, slower",
        "bundling was not measured: a bundle is too small",
        "decay failed: it was killed",
        "after a prompt of 2,000 tokens: 9.0 ms (1.2 to 1.8) a token",
        "the processes take 210 µs a layer; transformers in one process was not measured: no torch",
    ):
        assert sentence in text
    table = shown(found)
    assert "0.95×" in table
    assert table.count("not measured") == 1
    assert table.count("failed") == 2


def test_tables_have_every_contender_and_the_plant(found: dict[str, Any]) -> None:
    found["contenders"]["accelerate"] = {"absent": "not installed"}
    text = shown(found)
    assert "3.3%" in text
    assert "3.1%" in text
    for line in ("inflash ", "accelerate, disk offload", "llama.cpp, mmap", "floor: reads"):
        assert line in text
    assert "absent" in text


@pytest.mark.parametrize("studies", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_picture_is_drawn_of_what_there_is(
    found: dict[str, Any], studies: bool, packed: bool, tmp_path: Path
) -> None:
    found = add_studies(found) if studies else found
    found = add_packed(found) if packed else found
    found["contenders"]["accelerate"] = {"absent": "not installed"}
    before = copy.deepcopy(found)
    draw_report(found, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    assert found == before
