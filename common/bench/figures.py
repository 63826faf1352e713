"""Figures of runs: medians with their spread. Pure: what programs printed in, figures out.

Milliseconds and bytes are per decoded token, the prompt apart, unless a name says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from common.bench.contenders import Run

Figures = dict[str, Any]
"""What the report has of a contender: as JSON has it."""


def spread(values: Sequence[float]) -> Figures:
    """Median, quartiles and ends of at least one value."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def summarise(runs: Sequence[Run]) -> Figures:
    """A contender's figures over its runs: {"failed": sentence} if it failed in any of them."""
    failed = [run.problem for run in runs if run.problem]
    if failed or not runs:
        return {"failed": failed[0] if failed else "it was not run"}
    results = [run.result for run in runs if run.result is not None]
    times = [ms for result in results for ms in result["ms_per_token"]]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    swaps = [run.swap_bytes for run in runs if run.swap_bytes is not None]
    return {
        "ms_per_token": statistics.median(times),
        "peak_bytes": max(peaks, default=None),
        "bytes_per_token": _per_token(results),
        "spread_ms": spread(times),
        "mean_ms": statistics.fmean(times),
        "round_ms": [statistics.median(result["ms_per_token"]) for result in results],
        "prefill_ms": statistics.median(result["prefill_ms"] for result in results),
        "load_ms": statistics.median(result["load_ms"] for result in results),
        "major_faults": sum(result["major_faults"] for result in results) / len(times),
        "swap_bytes": max(swaps, default=None),
        "warm_bytes": max(run.warm_bytes for run in runs),
        "not_enforced": next((run.why_not_enforced for run in runs if run.why_not_enforced), ""),
        "version": results[0]["version"],
        "note": results[0]["note"],
    }


def summarise_inflash(runs: Sequence[Run]) -> Figures:
    """The same of inflash, with what only it can tell: its requests by kind, and its reads."""
    figures = summarise(runs)
    if "failed" in figures:
        return figures
    results = [run.result for run in runs if run.result is not None]
    requests = [request for result in results for request in result["requests"]]
    kinds = dict.fromkeys(request["kind"] for request in requests)
    by_kind = {kind: _requests([one for one in requests if one["kind"] == kind]) for kind in kinds}
    headline = by_kind.get("rotating") or by_kind["cold"]
    own = {key: value for key, value in headline.items() if key not in figures}
    return figures | own | {
        "requests": by_kind,
        "memory_bytes": results[0]["memory_bytes"],
        "cache_bytes": results[0]["cache_bytes"],
        "cache_share": results[0]["cache_share"],
        "process_peak_bytes": results[0]["process_peak_bytes"],
    }  # fmt: skip


def _requests(requests: Sequence[Figures]) -> Figures:
    """Requests of one kind, together."""
    times = [ms for request in requests for ms in request["timed"]["ms_per_token"]]
    stats = [request["stats"] for request in requests]
    steps = sum(one["new_tokens"] - 1 for one in stats)

    def total(field: str) -> float:
        return float(sum(one[field] for one in stats))

    read_s, read = total("decode_read_s"), total("decode_bytes_read")
    named = total("decode_hits") + total("decode_misses")
    waits = [request["waits"] for request in requests if request["waits"]]
    sizes = [one["read_bytes"] for one in waits if one["read_bytes"]]
    return {
        "ms_per_token": statistics.median(times),
        "spread_ms": spread(times),
        "prefill_ms": statistics.median(request["timed"]["prefill_ms"] for request in requests),
        "bytes_per_token": _per_token([request["timed"] for request in requests]),
        "own_bytes_per_token": read / steps,
        "read_ms": 1e3 * read_s / steps,
        "bytes_per_s_while_reading": read / read_s if read_s else None,
        "decode_ms": 1e3 * total("decode_s") / steps,  # by compute's clock
        "stall_ms": 1e3 * total("decode_stall_s") / steps,
        "hit_rate": total("decode_hits") / named if named else None,
        "late_share": _share(total("decode_late_fired"), total("decode_fired")),
        "wasted_bytes_per_token": total("decode_wasted_bytes") / steps,
        "named_per_token": named / steps,
        "fired_per_token": total("decode_fired") / steps,
        "context_tokens": sum(one["prompt_tokens"] + one["new_tokens"] / 2 for one in stats)
        / len(stats),
        "bytes_per_read": statistics.fmean(sizes) if sizes else None,
        "waits_ms": {
            name: statistics.fmean(one[f"{name}_ms"] for one in waits)
            for name in ("predictor", "queue", "flash")
        }
        if waits
        else None,
    }


def _per_token(timed: Iterable[Figures]) -> float | None:
    """The kernel's count of bytes read; None if it has none."""
    read, tokens = 0, 0
    for one in timed:
        if one["bytes_read"] is None:
            return None
        read += one["bytes_read"]
        tokens += len(one["ms_per_token"])
    return read / tokens


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
