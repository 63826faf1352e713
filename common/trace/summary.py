"""A run in figures: where the time went, per token and per layer, and which tokens were slow. Pure.

Milliseconds throughout. Figures are of decoded tokens: those after each answer's first, which holds
the whole prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.trace.run import Chain, Run
from common.trace.tokens import CAUSES, WAITS, Layer, Token

PERCENTILES = (50, 95, 99)
SLOWEST = 5
NS = 1e6  # in a millisecond


@dataclass(frozen=True)
class Hop:
    """What made a token slow: the cause that took most above its median, and where."""

    cause: str
    excess_ms: float
    layer: int | None
    sentence: str


@dataclass(frozen=True)
class Slow:
    token: Token
    hop: Hop


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """By name: p50, p95, p99 and max; zeros of nothing."""
    data = np.fromiter(values, float)
    if not len(data):
        return dict.fromkeys([*(f"p{p}" for p in PERCENTILES), "max"], 0.0)
    found = {f"p{p}": float(np.percentile(data, p)) for p in PERCENTILES}
    return found | {"max": float(data.max())}


def by_cause(tokens: Sequence[Token]) -> dict[str, float]:
    """Mean milliseconds of a token, by cause."""
    return {
        cause: sum(token.by_cause[cause] for token in tokens) / len(tokens) / NS for cause in CAUSES
    }


def by_layer(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """A row for each layer: percentiles of its time, its mean by cause, hit rate, late share."""
    layers: dict[int, list[Layer]] = defaultdict(list)
    for token in tokens:
        for layer in token.layers:
            layers[layer.layer].append(layer)
    rows = []
    for number, found in sorted(layers.items()):
        times = percentiles(layer.ns / NS for layer in found)
        causes = {c: sum(layer.by_cause[c] for layer in found) / len(found) / NS for c in CAUSES}
        hits, misses, fired, late = (
            sum(layer.counts[name] for layer in found)
            for name in ("hits", "misses", "fired", "late_fired")
        )
        rows.append(
            {"layer": number, "ms": times, "by_cause": causes,
             "hit_rate": share(hits, hits + misses), "late_share": share(late, fired)}
        )  # fmt: skip
    return rows


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def slowest(run: Run, count: int = SLOWEST) -> list[Slow]:
    """The slowest tokens, slowest first, each with the hop that made it so."""
    tokens = run.decoded
    usual = {c: float(np.median([token.by_cause[c] for token in tokens])) for c in CAUSES}
    in_layer = _usual_by_layer(tokens)
    reads_ms = _usual_read_ms(run)
    found = sorted(tokens, key=lambda token: token.ns, reverse=True)[:count]
    return [Slow(token, _hop(run, token, usual, in_layer, reads_ms)) for token in found]


def _usual_by_layer(tokens: Sequence[Token]) -> dict[tuple[int, str], float]:
    values: dict[tuple[int, str], list[int]] = defaultdict(list)
    for token in tokens:
        for layer in token.layers:
            for cause in CAUSES:
                values[layer.layer, cause].append(layer.by_cause[cause])
    return {key: float(np.median(found)) for key, found in values.items()}


def _usual_read_ms(run: Run) -> float:
    times = [span.ns for span in run.spans["reader"] if span.name == "read"]
    return float(np.median(times)) / NS if times else 0.0


def _hop(
    run: Run,
    token: Token,
    usual: dict[str, float],
    in_layer: dict[tuple[int, str], float],
    reads_ms: float,
) -> Hop:
    cause = max(CAUSES, key=lambda c: token.by_cause[c] - usual[c])
    excess_ms = (token.by_cause[cause] - usual[cause]) / NS
    worst = max(
        token.layers,
        key=lambda layer: layer.by_cause[cause] - in_layer[layer.layer, cause],
        default=None,
    )
    if worst is None or cause not in WAITS:
        number = worst.layer if worst else None
        if token.delayed_ns / NS > excess_ms / 2:
            why = f"compute had no core for {token.delayed_ns / NS:.1f} ms"
        else:
            why = f"{cause} took {excess_ms:.1f} ms more than usual"
        return Hop(cause, excess_ms, number, why)
    chain = run.chains.get((worst.step, worst.layer), Chain())
    why = {"predictor": _late_naming, "queue": _late_hand_over, "flash": _late_read}[cause](
        worst, chain, reads_ms
    )
    return Hop(cause, excess_ms, worst.layer, f"layer {worst.layer}: {why}")


def _late_naming(layer: Layer, chain: Chain, _: float) -> str:
    took = layer.by_cause["predictor"] / NS
    if chain.predict is None:
        return f"waited {took:.1f} ms for the predictor"
    before = (chain.predict.start_ns - layer.asked_ns) / NS
    own = chain.predict.ns / NS
    if before > own:
        return f"the predictor took {before:.1f} ms until it looked at what it was asked"
    return f"the predictor took {own:.1f} ms to name {chain.predict.field('named'):,} neurons"


def _late_hand_over(layer: Layer, chain: Chain, _: float) -> str:
    demand = next((f for f in chain.fetches if not f.field("prefetch")), None)
    took = layer.by_cause["queue"] / NS
    if demand is None or chain.predict is None:
        return f"messages lay between two processes for {took:.1f} ms"
    taken = (demand.start_ns - chain.predict.end_ns) / NS
    if taken > took / 2:
        return f"the reader took {taken:.1f} ms until it looked at what was named"
    return f"parts that were there waited for compute and its messages for {took:.1f} ms"


def _late_read(layer: Layer, chain: Chain, usual_ms: float) -> str:
    took = layer.by_cause["flash"] / NS
    if not chain.reads:
        return f"waited {took:.1f} ms for reads"
    longest = max(chain.reads, key=lambda span: span.ns)
    kind = "look-ahead" if longest.field("prefetch") else "demand"
    return (
        f"{longest.field('reads')} reads of {longest.field('bytes') / 1000:,.0f} kB ({kind}) took"
        f" {longest.ns / NS:.1f} ms, usual are {usual_ms:.1f}"
    )


def figures(run: Run) -> dict[str, Any]:
    """All of a run's figures as one plain object: what --json prints, the verdict aside."""
    decoded = run.decoded
    sums = {
        name: sum(token.count(name) for token in decoded)
        for name in ("hits", "misses", "prefetched", "fired", "late_fired", "bytes_read", "reads")
    }
    wall_ms = _covered_ns(decoded) / NS
    return {
        "run_dir": str(run.run_dir),
        "requests": [_request(run, number) for number in dict.fromkeys(
            token.request for token in run.tokens)],
        "tokens_per_s": len(decoded) * 1000 / wall_ms if wall_ms else 0.0,
        "token_ms": percentiles(token.ns / NS for token in decoded),
        "by_cause": by_cause(decoded),
        "delayed_ms": sum(token.delayed_ns for token in decoded) / len(decoded) / NS,
        "hit_rate": share(sums["hits"], sums["hits"] + sums["misses"]),
        "late_share": share(sums["late_fired"], sums["fired"]),
        "bytes_per_token": sums["bytes_read"] / len(decoded),
        "reads_per_token": sums["reads"] / len(decoded),
        "layers": by_layer(decoded),
        "slowest": [
            {"request": run.ordinal(slow.token.request), "index": slow.token.index,
             "wall_ms": slow.token.ns / NS, "cause": slow.hop.cause, "layer": slow.hop.layer,
             "why": slow.hop.sentence}
            for slow in slowest(run)
        ],
        "tokens": [
            {"request": run.ordinal(token.request), "index": token.index,
             "wall_ms": token.ns / NS, "delayed_ms": token.delayed_ns / NS,
             "by_cause": {cause: token.by_cause[cause] / NS for cause in CAUSES}}
            for token in run.tokens
        ],
    }  # fmt: skip


def _covered_ns(tokens: Sequence[Token]) -> int:
    """The time in which any of them was made: requests that run together share it."""
    covered = end_ns = 0
    for token in sorted(tokens, key=lambda token: token.start_ns):
        covered += max(token.end_ns - max(token.start_ns, end_ns), 0)
        end_ns = max(end_ns, token.end_ns)
    return covered


def _request(run: Run, number: int) -> dict[str, Any]:
    tokens = [token for token in run.tokens if token.request == number]
    request = next(r for r in run.requests if r.number == number)
    return {
        "request": request.ordinal,
        "number": number,
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": len(tokens),
        "queued_ms": (request.started_ns - request.arrived_ns) / NS,
        "first_token_ms": tokens[0].ns / NS if tokens[0].index == 0 else None,
    }
