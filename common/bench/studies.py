"""Studies beside the comparison: a long prompt, several clients, growth with the model, cost of
context, cost of the processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.bench import contenders
from common.bench.contenders import Contender, Run, Work
from common.bench.figures import Figures, spread, summarise, summarise_inflash
from common.bench.made import Made, Shape

GROWING = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b")
GROWTH_CACHE = "24%"  # of the FFN, for every shape: as published
SHORT_CONTEXT = 16  # tokens
LONG_CONTEXT = 2048
PREFILL_TOKENS = 512
PREFILL_FIELD = f"prefill_{PREFILL_TOKENS}_ms"

Runs = Callable[[list[Contender]], Mapping[str, list[Run]]]
"""Runs contenders by turns; by name."""


def prefill(asked: list[Contender], runs: Runs) -> Figures:
    """The time to the first token of a prompt of PREFILL_TOKENS, by contender's name; each is asked
    it once, right after it has started."""
    found = runs(asked)
    return {one.name: _prefill(found[one.name]) for one in asked}


def _prefill(done: Sequence[Run]) -> Figures:
    figures = summarise(done)
    if "failed" in figures:
        return figures
    times = [run.result["prefill_ms"] for run in done if run.result is not None]
    return {
        PREFILL_FIELD: statistics.median(times),
        "spread_ms": spread(times),
        "peak_bytes": figures["peak_bytes"],
        "not_enforced": figures["not_enforced"],
    }


def clients(asked: list[Contender], counts: Sequence[int], runs: Runs) -> dict[str, list[Figures]]:
    """Tokens a second by how many clients ask each contender at once: a row for each of `counts`,
    which it was made with; medians of the rounds, and the smallest share."""
    found = runs(asked)
    return {one.name: _clients(found[one.name], counts) for one in asked}


def _clients(done: Sequence[Run], counts: Sequence[int]) -> list[Figures]:
    figures = summarise(done)
    if "failed" in figures:
        return [{"n": count, "failed": figures["failed"]} for count in counts]
    rounds = [run.result["clients"] for run in done if run.result is not None]
    rows = []
    for same in zip(*rounds, strict=True):
        speeds = [row["tokens_per_s"] for row in same]
        rows.append({
            "n": same[0]["n"],
            "tokens_per_s": statistics.median(speeds),
            "slowest_share": min(row["slowest_share"] for row in same),
            "round_tokens_per_s": speeds,
            "peak_bytes": figures["peak_bytes"],
        })  # fmt: skip
    return rows


def growing_shapes(shape: Shape) -> list[str]:
    """The shapes of the growth study up to the size of `shape`; all of them if it is none."""
    if shape.name not in GROWING:
        return list(GROWING)
    return list(GROWING[: GROWING.index(shape.name) + 1])


def growth_row(shape: Shape, made: Made, work: Work, runs: Runs) -> Figures:
    """A token's time and bytes of one shape, with the same share of its FFN cached, no cap."""
    settings = {"cache": GROWTH_CACHE}
    contender = contenders.inflash(shape.name, made.store, work, settings, None, prompts=2)
    figures = summarise_inflash(runs([contender])[shape.name])
    sizes = {"shape": shape.name, "checkpoint_bytes": shape.checkpoint_bytes}
    return sizes | ({"failed": figures["failed"]} if "failed" in figures else _token(figures))


def context_cost(
    store: Path,
    context_max: int,
    work_of: Callable[[int], Work],
    settings: Mapping[str, str],
    cap_bytes: int,
    runs: Runs,
) -> list[Figures]:
    """A token after a short prompt and after one that nearly fills the context.

    `work_of` gives the work with a prompt of so many tokens.
    """
    room = min(LONG_CONTEXT, context_max)
    lengths = [SHORT_CONTEXT, room - work_of(1).tokens - 1]
    own = {**settings, "context": f"{room}"}
    asked = [
        contenders.inflash(f"{length} tokens", store, work_of(length), own, cap_bytes, prompts=2)
        for length in lengths
    ]
    found = runs(asked)
    rows = []
    for length, contender in zip(lengths, asked, strict=True):
        figures = summarise_inflash(found[contender.name])
        rows.append(
            {"prompt_tokens": length}
            | ({"failed": figures["failed"]} if "failed" in figures else _token(figures))
        )
    return rows


def everything_cached(
    store: Path, layers: int, work: Work, plain: Contender | str, runs: Runs
) -> Figures:
    """What the processes cost where nothing is read: a token's time less that in which compute
    computes, for each layer.

    `plain`: transformers on the same checkpoint, dense, in one process; or why it is absent.
    """
    settings = {"cache": "100%"}
    cached = contenders.inflash("everything cached", store, work, settings, None, prompts=3)
    found = runs([cached] if isinstance(plain, str) else [cached, plain])
    figures = summarise_inflash(found[cached.name])
    if "failed" in figures:
        return {"failed": figures["failed"]}
    beside = {"absent": plain} if isinstance(plain, str) else summarise(found[plain.name])
    computing_ms = figures["decode_ms"] - figures["stall_ms"]
    row = _token(figures) | {
        "layers": layers,
        "computing_ms": computing_ms,
        "processes_us_per_layer": 1e3 * (figures["mean_ms"] - computing_ms) / layers,
        "plain": beside,
    }
    if "ms_per_token" in beside:
        difference = figures["ms_per_token"] - beside["ms_per_token"]
        row["over_plain_us_per_layer"] = 1e3 * difference / layers
    return row


def _token(figures: Figures) -> Figures:
    fields = ("ms_per_token", "mean_ms", "spread_ms", "bytes_per_token", "peak_bytes", "stall_ms",
              "prefill_ms", "cache_bytes", "hit_rate")  # fmt: skip
    return {field: figures[field] for field in fields}
