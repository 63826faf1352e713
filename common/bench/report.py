"""The bench's report for a person: sentences that say what was found, and what was not.

Pure: takes the report's object (common/bench/run.py). Nothing is claimed that its spread does not
bear, and what could not be enforced, measured or run is said as plainly as the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal

from common.bench.ablation import ROUNDS_MIN
from common.bench.figures import Figures
from common.bench.names import NOT_ASKED, OURS, PACKED, PEERS, RIVALS, UNCAPPED
from common.bench.studies import PREFILL_FIELD

TITLES = {
    "inflash": "inflash",
    "inflash_int8": "inflash, int8",
    "inflash_int4": "inflash, int4",
    "accelerate": "accelerate, disk offload",
    "llama_cpp_mmap": "llama.cpp, mmap",
    "llama_cpp_ram": "llama.cpp, all in RAM",
    "llama_cpp_q8_0": "llama.cpp Q8_0, mmap",
    "llama_cpp_q4_0": "llama.cpp Q4_0, mmap",
}
LOAD_MAX = 0.5  # of a core: above it something else was running


def ran(figures: Figures) -> bool:
    """Whether a contender, or a step, has figures."""
    return "ms_per_token" in figures


def asked(found: Figures) -> dict[str, Figures]:
    """The contenders that were asked for, by name, in order."""
    named = found["contenders"].items()
    return {name: one for name, one in named if one.get("absent") != NOT_ASKED}


def verdicts(found: Figures) -> list[str]:
    """The report's sentences, in order."""
    return [
        *_against_rivals(found),
        *_against_floors(found),
        *_requests(found),
        *_prefill(found),
        *_clients(found),
        *_studies(found),
        *_caveats(found),
    ]


def _against_rivals(found: Figures) -> Iterator[str]:
    """Each of ours, and beside it the rivals with as many bits a number."""
    run = {name: one for name, one in found["contenders"].items() if ran(one)}
    under = f"under a cap of {decimal(found['cap_bytes'])}"
    for name in (name for name in OURS if name in run):
        ours = run[name]
        yield (
            f"{TITLES[name]}: {_ms(ours)} a token {under}, with {_bytes(ours['bytes_per_token'])}"
            " read for each"
        )
        if name in PACKED:
            yield f"{_compared(ours, run['inflash'])} inflash with all numbers in 16 bits"
            yield _behaviour(ours, run["inflash"], found)
        for other in RIVALS:
            peer = PEERS.get(other, "inflash")
            if other in run and name == (peer if peer in run else "inflash"):
                theirs = run[other]
                where = "without a cap" if other in UNCAPPED else "under the same cap"
                yield f"{_compared(ours, theirs)} {TITLES[other]} {where} ({_ms(theirs)})"


def _behaviour(ours: Figures, plain: Figures, found: Figures) -> str:
    """Whether packed weights do what the plant is for: by the neurons that the servers counted."""
    neurons = found["layers"] * found["neurons"]
    (fired, named), (fired_plain, named_plain) = (
        (one["fired_per_token"] / neurons, one["named_per_token"] / neurons)
        for one in (ours, plain)
    )
    return (
        f"in it {fired:.1%} of the neurons fired and {named:.1%} were named, where in 16 bits it"
        f" was {fired_plain:.1%} and {named_plain:.1%}"
    )


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


def _prefill(found: Figures) -> Iterator[str]:
    """A long prompt: each that was asked it, and how ours stand to rivals of as many bits."""
    if "prefill" not in found:
        return
    rows, tokens = found["prefill"]["contenders"], found["prefill"]["tokens"]
    timed = {name: one for name, one in rows.items() if "failed" not in one}
    for name, one in rows.items():
        if name not in timed:
            yield f"a prompt of {tokens:,} tokens: {TITLES[name]} failed: {one['failed']}"
    for name in (name for name in OURS if name in timed):
        ours = timed[name]
        said = [
            f"a prompt of {tokens:,} tokens: {TITLES[name]} takes {_s(ours)} to its first token"
        ]
        for other in (other for other in RIVALS if other in timed):
            peer = PEERS.get(other, "inflash")
            if name == (peer if peer in timed else "inflash"):
                theirs = timed[other]
                compared = _compared(ours, theirs, PREFILL_FIELD)
                said.append(f"{compared} {TITLES[other]} ({_s(theirs)})")
        yield "; ".join(said)


def by_clients(found: Figures) -> dict[str, list[Figures]]:
    """The rows of several clients, by which of ours they asked."""
    return {"inflash": found["clients"], **found["packed_clients"]} if "clients" in found else {}


def _clients(found: Figures) -> Iterator[str]:
    for name, rows in by_clients(found).items():
        yield from _clients_of(TITLES[name], rows)


def _clients_of(title: str, rows: list[Figures]) -> Iterator[str]:
    for row in rows:
        who = f"{title}: 1 client" if row["n"] == 1 else f"{title}: {row['n']} clients"
        if "failed" in row:
            yield f"{who} failed: {row['failed']}"
            return  # one server had them all
        speed = row["tokens_per_s"]
        said = f"{who}: {speed:,.2f} tokens/s together"
        if row is not rows[0]:
            said += f", {speed / rows[0]['tokens_per_s']:.2f} times what {rows[0]['n']} got"
        if row["n"] > 1:
            said += f"; the slowest had {row['slowest_share']:.2f} of their mean"
        yield said


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
    for name, figures in asked(found).items():
        title = TITLES[name]
        if "absent" in figures:
            yield f"absent: {title}: {figures['absent']}"
        elif "failed" in figures:
            yield f"failed: {title}: {figures['failed']}"
        else:
            yield from _contender_caveats(title, figures, found["cap_bytes"], name in UNCAPPED)
    llama = [one for name, one in asked(found).items() if name.startswith("llama_cpp") and ran(one)]
    # The quantised files' notes say more than the others'.
    notes = sorted({one["note"] for one in llama if one["note"]})
    for note in notes:
        if not any(other != note and other.startswith(note) for other in notes):
            yield f"llama.cpp: {note}"
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


def _compared(ours: Figures, theirs: Figures, field: str = "ms_per_token") -> str:
    """What the two medians say of each other, if their quartiles do not overlap."""
    (low, high), (other_low, other_high) = (
        figures["spread_ms"]["quartiles"] for figures in (ours, theirs)
    )
    if low <= other_high and other_low <= high:
        return "within the spread it is as fast as"
    ratio = theirs[field] / ours[field]
    if ratio > 1:
        return f"it is {ratio:.1f} times as fast as"
    return f"it takes {1 / ratio:.1f} times as long as"


def _s(figures: Figures) -> str:
    return f"{figures[PREFILL_FIELD] / 1e3:,.2f} s"


def _ms(figures: Figures) -> str:
    low, high = figures["spread_ms"]["quartiles"]
    return f"{figures['ms_per_token']:,.1f} ms ({low:,.1f} to {high:,.1f})"


def _bytes(count: Any) -> str:
    return "an unknown number of bytes" if count is None else decimal(int(count))


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
