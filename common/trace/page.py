"""A run as one page that needs nothing else: no network, no other file. Pure.

page.html beside this is the page; what it shows is put into it as one JSON object.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.spans import Span
from common.trace.run import Chain, Run
from common.trace.summary import share
from common.trace.tokens import CAUSES, LEAVES, Token
from common.trace.verdict import Verdict

TOKENS_MAX = 3000  # bars: the latest
TIMELINES_MAX = 24
TIMELINES_SLOW = 8  # of them, the slowest; the others lie evenly over the run
TEMPLATE = Path(__file__).with_name("page.html")
LANES = ("compute", "predictor", "reader", "reads")


def page_of(run: Run, figures: Mapping[str, Any], verdict: Verdict) -> str:
    """The page's text."""
    store = run.facts.get("store", {})
    tokens = run.tokens[-TOKENS_MAX:]
    data = {
        "store": {key: store.get(key) for key in ("path", "family", "layers", "neurons", "dtype")},
        "settings": run.facts.get("settings", {}),
        "cache_bytes": run.facts.get("plan", {}).get("cache_bytes"),
        "ffn_bytes": store.get("ffn_bytes"),
        "verdict": verdict.plain(),
        "figures": {key: value for key, value in figures.items() if key != "tokens"},
        "causes": CAUSES,
        "tokens": [_bar(run, token) for token in tokens],
        "timelines": {str(tokens.index(token)): _timeline(run, token) for token in chosen(tokens)},
        "chunks": _chunks(run),
    }
    text = json.dumps(data, separators=(",", ":"), default=str).replace("</", "<\\/")
    title = html.escape(Path(str(store.get("path", run.run_dir))).name)
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", title).replace("{{data}}", text)


def chosen(tokens: list[Token]) -> list[Token]:
    """The tokens whose timelines are in the page: the slowest, and some of all times."""
    decoded = [token for token in tokens if token.index > 0] or tokens
    slow = sorted(decoded, key=lambda token: token.ns, reverse=True)[:TIMELINES_SLOW]
    places = np.linspace(0, len(decoded) - 1, min(TIMELINES_MAX - TIMELINES_SLOW, len(decoded)))
    even = [decoded[int(place)] for place in places]
    return list({token.start_ns: token for token in [*slow, *even]}.values())


def _bar(run: Run, token: Token) -> list[Any]:
    """[request, index, ms, [ms by cause], hit rate, late share, MB read]."""
    hits, misses = token.count("hits"), token.count("misses")
    return [
        run.ordinal(token.request),
        token.index,
        round(token.ns / 1e6, 3),
        [round(token.by_cause[cause] / 1e6, 3) for cause in CAUSES],
        _round(share(hits, hits + misses)),
        _round(share(token.count("late_fired"), token.count("fired"))),
        round(token.count("bytes_read") / 1e6, 3),
    ]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _timeline(run: Run, token: Token) -> list[list[Any]]:
    """What happened in a token: [lane, name, layer, from, for, text], in µs since it began."""
    rows = [
        _row(token, "compute", span, _what(span)) for span in token.spans if span.name in LEAVES
    ]
    for layer in token.layers:
        chain = run.chains.get((layer.step, layer.layer), Chain())
        for span in filter(None, (chain.predict, chain.ahead)):
            text = f"{span.field('named'):,} neurons named"
            rows.append(_row(token, "predictor", span, text))
        for span in chain.fetches:
            kind = "ahead" if span.field("prefetch") else "demand"
            text = f"{kind}: {span.field('named'):,} named, {span.field('missing'):,} missing"
            rows.append(_row(token, "reader", span, text))
        for span in chain.reads:
            kind = "read ahead" if span.field("prefetch") else "demand"
            text = (
                f"{kind}: {span.field('neurons'):,} neurons in {span.field('reads'):,} reads,"
                f" {span.field('bytes') / 1000:,.0f} kB"
            )
            rows.append(_row(token, "reads", span, text))
    return rows


def _row(token: Token, lane: str, span: Span, text: str) -> list[Any]:
    name = span.name
    if name == "read" and span.field("prefetch"):
        name = "read ahead"
    start_us = round((span.start_ns - token.start_ns) / 1000, 1)
    return [LANES.index(lane), name, span.layer, start_us, round(span.ns / 1000, 1), text]


def _what(span: Span) -> str:
    if span.name == "wait":
        causes = {c: span.field(f"{c}_ns") / 1000 for c in ("predictor", "queue", "flash")}
        return ", ".join(f"{cause} {us:,.0f} µs" for cause, us in causes.items() if us >= 1)
    if span.name == "ffn":
        return f"part {span.field('part')}: {span.field('neurons'):,} neurons"
    if "product_ns" in span.named_fields():
        return f"products {span.field('product_ns') / 1000:,.0f} µs"
    return ""


def _chunks(run: Run) -> dict[str, list[list[float]]]:
    """Reads by their size: [kB, reads], of demands and of look-ahead. A group's reads count with
    their mean, to a power of two."""
    found: dict[str, Counter[int]] = {"demand": Counter(), "ahead": Counter()}
    for span in run.spans["reader"]:
        if span.name == "read" and span.field("reads"):
            size = span.field("bytes") / span.field("reads")
            kind = "ahead" if span.field("prefetch") else "demand"
            found[kind][round(size).bit_length() - 1] += span.field("reads")
    return {
        kind: [[2**power / 1024, count] for power, count in sorted(counts.items())]
        for kind, counts in found.items()
    }
