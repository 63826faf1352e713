"""The report's tables. Takes the report's object (common/bench/run.py), gives rich tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from common.bench.clients import PROMPT_TOKENS
from common.bench.figures import Figures
from common.bench.names import PACKED
from common.bench.report import TITLES, asked, by_clients, ran
from common.bench.studies import PREFILL_FIELD

NONE = "–"


def tables(found: Figures) -> Iterator[Table]:
    """All tables that the object has rows for, in order."""
    yield planted(found)
    yield contenders(found)
    if "prefill" in found:
        yield prefill(found)
    if "clients" in found:
        yield clients(found)
    if "ablation" in found:
        yield ablation(found)
    if "growth" in found:
        yield growth(found)


def planted(found: Figures) -> Table:
    """The plant: published, planted, measured; and measured in each packed store."""
    keys = ["published", "planted", "measured"]
    keys += [
        key for key in map("measured_{}".format, PACKED.values()) if key in found["planted"][0]
    ]
    title = f"{found['shape']}: the plant"
    table = _table(title, "what", *(key.replace("measured_", "in ") for key in keys))
    for row in found["planted"]:
        table.add_row(row["what"], *(percent(row[key]) for key in keys))
    return table


def contenders(found: Figures) -> Table:
    """A token's time of each, with its spread."""
    table = _table(
        f"a token, cap {decimal(found['cap_bytes'])}",
        "contender", "ms", "quartiles", "min–max", "tokens", "peak", "read a token",
    )  # fmt: skip
    named = [(TITLES[name], figures) for name, figures in asked(found).items()]
    named.insert(1, ("inflash, look-ahead off", found["serial"]))
    for title, figures in named:
        if ran(figures):
            table.add_row(title, *_time(figures), size(figures["peak_bytes"]),
                          size(figures["bytes_per_token"]))  # fmt: skip
        else:
            table.add_row(title, "absent" if "absent" in figures else "failed")
    floors = found["floors"]
    table.add_section()
    table.add_row("floor: reads", f"{floors['read_ms']:,.1f}")
    table.add_row("floor: products", f"{floors['compute_ms']:,.1f}")
    return table


def prefill(found: Figures) -> Table:
    """The time to the first token of a long prompt."""
    tokens = found["prefill"]["tokens"]
    table = _table(
        f"a prompt of {tokens} tokens, cap {decimal(found['cap_bytes'])}",
        "contender", "s to the first token", "min–max", "tokens/s", "peak",
    )  # fmt: skip
    for name, row in found["prefill"]["contenders"].items():
        if "failed" in row:
            table.add_row(TITLES[name], "failed")
            continue
        ms, ends = row[PREFILL_FIELD], row["spread_ms"]
        table.add_row(
            TITLES[name], f"{ms / 1e3:,.2f}",
            f"{ends['min'] / 1e3:,.2f}–{ends['max'] / 1e3:,.2f}",
            f"{1e3 * tokens / ms:,.1f}", size(row["peak_bytes"]),
        )  # fmt: skip
    return table


def clients(found: Figures) -> Table:
    """What several clients of one server get together."""
    table = _table(
        f"clients at once, {PROMPT_TOKENS} + {found['tokens']} tokens each",
        "contender", "clients", "tokens/s", "times the first", "slowest ÷ mean", "peak",
    )  # fmt: skip
    for name, rows in by_clients(found).items():
        first = rows[0].get("tokens_per_s")
        for row in rows:
            title = TITLES[name] if row is rows[0] else ""
            if "failed" in row:
                table.add_row(title, f"{row['n']}", "failed")
                continue
            speed = row["tokens_per_s"]
            table.add_row(
                title, f"{row['n']}", number(speed), number(speed / first, "×"),
                number(row["slowest_share"]), size(row["peak_bytes"]),
            )  # fmt: skip
    return table


def ablation(found: Figures) -> Table:
    """A row for each step."""
    table = _table(
        "ablation",
        "step", "ms", "gain", "peak", "read a token", "GB/s", "reads, ms", "stall, ms",
        "verdict",
    )  # fmt: skip
    for row in found["ablation"]:
        if not ran(row):
            table.add_row(row["step"], *[NONE] * 7, "not measured" if "absent" in row else "failed")
            continue
        speed = row["bytes_per_s_while_reading"]
        table.add_row(
            row["step"], f"{row['ms_per_token']:,.1f}", number(row.get("gain"), "×"),
            size(row["peak_bytes"]), size(row["bytes_per_token"]),
            number(None if speed is None else speed / 1e9), number(row["read_ms"]),
            number(row["stall_ms"]), row.get("verdict", ""),
        )  # fmt: skip
    return table


def growth(found: Figures) -> Table:
    """A token by the model's size."""
    table = _table("growth, 24% of the FFN cached, no cap", "shape", "checkpoint", "ms",
                   "quartiles", "min–max", "tokens", "read a token")  # fmt: skip
    for row in found["growth"]:
        sizes = size(row["checkpoint_bytes"])
        if ran(row):
            table.add_row(row["shape"], sizes, *_time(row), size(row["bytes_per_token"]))
        else:
            table.add_row(row["shape"], sizes, "failed")
    return table


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def size(count: Any) -> str:
    return NONE if count is None else decimal(int(count))


def number(value: float | None, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.2f}{unit}"


def _time(figures: Figures) -> tuple[str, str, str, str]:
    spread = figures["spread_ms"]
    low, high = spread["quartiles"]
    return (
        f"{figures['ms_per_token']:,.1f}",
        f"{low:,.1f}–{high:,.1f}",
        f"{spread['min']:,.1f}–{spread['max']:,.1f}",
        f"{spread['count']}",
    )


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=None, title_justify="left", title_style="bold")
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
