"""The bench's report for a person: sentences that say what was found, and what was not.

Pure: takes the report's object (common/bench/run.py). Nothing is claimed that its spread does not
bear, and what could not be enforced, measured or run is said as plainly as the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal

from common.bench.ablation import ROUNDS_MIN
from common.bench.contenders import RIVALS
from common.bench.figures import Figures

TITLES = {
    "inflash": "inflash",
    "accelerate": "accelerate, disk offload",
    "llama_cpp_mmap": "llama.cpp, mmap",
    "llama_cpp_ram": "llama.cpp, all in RAM",
}
UNCAPPED = ("llama_cpp_ram",)
LOAD_MAX = 0.5  # of a core: above it something else was running


def ran(figures: Figures) -> bool:
    """Whether a contender, or a step, has figures."""
    return "ms_per_token" in figures


def verdicts(found: Figures) -> list[str]:
    """The report's sentences, in order."""
    return [
        *_against_rivals(found),
        *_against_floors(found),
        *_requests(found),
        *_studies(found),
        *_caveats(found),
    ]


def _against_rivals(found: Figures) -> Iterator[str]:
    ours = found["contenders"]["inflash"]
    yield (
        f"inflash: {_ms(ours)} a token under a cap of {decimal(found['cap_bytes'])}, with"
        f" {_bytes(ours['bytes_per_token'])} read for each"
    )
    for name in RIVALS:
        theirs = found["contenders"][name]
        if not ran(theirs):
            continue
        where = "without a cap" if name in UNCAPPED else "under the same cap"
        yield f"{_compared(ours, theirs)} {TITLES[name]} {where} ({_ms(theirs)})"


def _against_floors(found: Figures) -> Iterator[str]:
    floors, ours = found["floors"], found["contenders"]["inflash"]
    larger = max(("read_ms", "compute_ms"), key=lambda name: floors[name])
    what = "reads" if larger == "read_ms" else "products"
    yield (
        f"floors: its reads take {floors['read_ms']:,.1f} ms at"
        f" {_speed(floors['drive_bytes_per_s'])}, its products {floors['compute_ms']:,.1f} ms at"
        f" {_speed(floors['memory_bytes_per_s'])}; a token takes"
        f" {ours['ms_per_token'] / floors[larger]:.1f} times the larger, the {what}"
    )
    efficiency = found["overlap_efficiency"]
    if efficiency is None:
        yield "overlap: without look-ahead a token is at its floor already; nothing can be saved"
    else:
        yield (
            f"overlap: {found['serial_ms']:,.1f} ms without look-ahead,"
            f" {ours['ms_per_token']:,.1f} with it: {efficiency:.0%} of what overlap could save"
        )


def _requests(found: Figures) -> Iterator[str]:
    kinds = found["contenders"]["inflash"]["requests"]
    yield "requests: " + "; ".join(
        f"{kind} {_ms(one)}, {_bytes(one['bytes_per_token'])} a token"
        for kind, one in kinds.items()
    )


def _studies(found: Figures) -> Iterator[str]:
    for row in found.get("ablation", ()):
        if row.get("verdict", "helps") != "helps":
            gain = f"{row['gain']:.2f} times as fast as the step before"
            yield f"ablation: {row['step']} is not seen to help here: {gain}, {row['verdict']}"
        if "absent" in row:
            yield f"ablation: {row['step']} was not measured: {row['absent']}"
        if "failed" in row:
            yield f"ablation: {row['step']} failed: {row['failed']}"
    for row in found.get("context_cost", ()):
        after = f"after a prompt of {row['prompt_tokens']:,} tokens"
        yield f"context: {after}: {row.get('failed') or _ms(row) + ' a token'}"
    if cached := found.get("everything_cached"):
        yield _cached(cached)


def _cached(row: Figures) -> str:
    if not ran(row):
        return f"everything cached: it failed: {row['failed']}"
    said = (
        f"everything cached: {_ms(row)} a token, of which the processes take"
        f" {row['processes_us_per_layer']:,.0f} µs a layer"
    )
    plain = row["plain"]
    if not ran(plain):
        why = plain.get("absent") or plain.get("failed")
        return f"{said}; transformers in one process was not measured: {why}"
    return (
        f"{said}; transformers in one process, every neuron multiplied: {_ms(plain)}, a difference"
        f" of {row['over_plain_us_per_layer']:+,.0f} µs a layer"
    )


def _caveats(found: Figures) -> Iterator[str]:
    """What a reader has to know before believing the figures."""
    for name, figures in found["contenders"].items():
        title = TITLES[name]
        if "absent" in figures:
            yield f"absent: {title}: {figures['absent']}"
        elif "failed" in figures:
            yield f"failed: {title}: {figures['failed']}"
        else:
            yield from _contender_caveats(title, figures, found["cap_bytes"], name in UNCAPPED)
    llama = [found["contenders"][name] for name in RIVALS if name.startswith("llama_cpp")]
    if notes := {one["note"] for one in llama if ran(one) and one["note"]}:
        yield f"llama.cpp: {'; '.join(sorted(notes))}"
    if found["rounds"] < ROUNDS_MIN:
        yield (
            f"rounds: {found['rounds']}: what the machine did between two runs is not told apart"
            f" from what the runs did; --rounds {ROUNDS_MIN} or more does"
        )
    load = found["machine"]["load_before"]
    if load is not None and load > LOAD_MAX:
        yield (
            f"the machine had a load of {load:.1f} before the first run: something else was"
            " running, and the times are too long"
        )
    cache = found["floors"]["memory"]["last_level_cache_bytes"]
    matrices = found["floors"]["memory"]["matrices_bytes"]
    if cache is None or matrices < 2 * cache:
        yield (
            "the memory's speed may be the processor cache's:"
            f" {decimal(matrices)} of matrices were multiplied"
        )
    yield (
        "page caches were dropped and found empty before every run; what a drive or a host below"
        " this system caches could not be, and the interpreters' shared libraries were left warm,"
        " charged to nobody"
    )


def _contender_caveats(title: str, figures: Figures, cap: int, uncapped: bool) -> Iterator[str]:
    if figures["not_enforced"]:
        yield f"{title}: {figures['not_enforced']}"
    peak = figures["peak_bytes"]
    if peak is not None and not uncapped and peak > cap:
        yield f"{title}: its peak, {decimal(peak)}, is above the cap"
    if figures["swap_bytes"]:
        yield f"{title}: {decimal(figures['swap_bytes'])} of it were swapped out"
    if figures["warm_bytes"]:
        yield f"{title}: {decimal(figures['warm_bytes'])} of its files could not be made cold"
    if figures["bytes_per_token"] is None:
        yield f"{title}: this system does not count the bytes that it read"


def _compared(ours: Figures, theirs: Figures) -> str:
    """What the two medians say of each other, if their quartiles do not overlap."""
    (low, high), (other_low, other_high) = (
        figures["spread_ms"]["quartiles"] for figures in (ours, theirs)
    )
    if low <= other_high and other_low <= high:
        return "within the spread it is as fast as"
    ratio = theirs["ms_per_token"] / ours["ms_per_token"]
    if ratio > 1:
        return f"it is {ratio:.1f} times as fast as"
    return f"it takes {1 / ratio:.1f} times as long as"


def _ms(figures: Figures) -> str:
    low, high = figures["spread_ms"]["quartiles"]
    return f"{figures['ms_per_token']:,.1f} ms ({low:,.1f} to {high:,.1f})"


def _bytes(count: Any) -> str:
    return "an unknown number of bytes" if count is None else decimal(int(count))


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
