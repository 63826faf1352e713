"""A run for the terminal: where the time went, per layer, the slowest tokens, the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.trace.tokens import CAUSES, IN_A_LAYER
from common.trace.verdict import Verdict

COLOURS = {
    "compute": "green", "predictor": "magenta", "queue": "yellow", "flash": "red",
    "others": "cyan", "python": "blue",
}  # fmt: skip
WHAT = {
    "compute": "products of matrices, choosing the token",
    "predictor": "waiting until the neurons were named",
    "queue": "waiting while messages lay between processes",
    "flash": "waiting for reads",
    "others": "prompts of other requests, computed in between",
    "python": "the model's own code, making and sending messages",
}
BAR = 60  # characters
LAYERS_MAX = 48  # rows of the table of layers; then only the slowest


def whole(found: Mapping[str, Any], verdict: Verdict) -> RenderableType:
    """All of a run."""
    return Group(heading(found), causes(found), layers(found), slowest(found), panel(verdict))


def heading(found: Mapping[str, Any]) -> RenderableType:
    ms = found["token_ms"]
    lines = [
        f"{len(found['tokens']):,} tokens of {len(found['requests'])} requests ·"
        f" {found['tokens_per_s']:.1f} tokens/s after the first",
        f"a token: median {ms['p50']:.1f} ms, 95 % {ms['p95']:.1f}, 99 % {ms['p99']:.1f},"
        f" longest {ms['max']:.1f}",
        f"hit rate {percent(found['hit_rate'])} · late {percent(found['late_share'])} · a token"
        f" reads {found['bytes_per_token'] / 1e6:.2f} MB in {found['reads_per_token']:,.0f} reads",
    ]
    return Padding(Text("\n".join(lines)), (1, 0, 0, 0))


def causes(found: Mapping[str, Any]) -> RenderableType:
    """Where a mean token's time went."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="where a token's time went",
                  title_justify="left", title_style="bold")  # fmt: skip
    for name, justify in (("cause", "left"), ("ms", "right"), ("share", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    wall = sum(found["by_cause"].values()) or 1.0
    for cause, ms in found["by_cause"].items():
        label = Text("■ ", style=COLOURS[cause]) + Text(cause, style="default")
        table.add_row(label, f"{ms:.2f}", f"{ms / wall:.1%}", Text(WHAT[cause], style="dim"))
    delayed = found["delayed_ms"]
    if delayed > 0.02 * wall:
        table.add_section()
        what = Text("of these: compute could run and had to wait for one", style="dim")
        table.add_row("  no core", f"{delayed:.2f}", f"{delayed / wall:.1%}", what)
    return Group(table, bar(found["by_cause"]), Text())


def bar(by_cause: Mapping[str, float], width: int = BAR) -> Text:
    """The shares as one line."""
    wall, text, drawn = sum(by_cause.values()) or 1.0, Text(), 0
    passed = 0.0
    for cause in CAUSES:
        passed += by_cause[cause]
        count = round(passed / wall * width) - drawn
        drawn += count
        text.append("█" * count, style=COLOURS[cause])
    return text


def layers(found: Mapping[str, Any]) -> RenderableType:
    """A row for each layer."""
    rows = found["layers"]
    title = "per layer, ms"
    if len(rows) > LAYERS_MAX:
        title += f" (the {LAYERS_MAX} slowest of {len(rows)})"
        some = sorted(rows, key=lambda row: row["ms"]["p50"], reverse=True)[:LAYERS_MAX]
        rows = sorted(some, key=lambda row: row["layer"])
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left",
        title_style="bold",
    )  # fmt: skip
    for name in ("layer", "median", "95 %", *IN_A_LAYER, "hits", "late"):
        table.add_column(name, justify="right", style=COLOURS.get(name, ""))
    for row in rows:
        times = (f"{row['ms'][p]:.2f}" for p in ("p50", "p95"))
        by_cause = (f"{row['by_cause'][cause]:.2f}" for cause in IN_A_LAYER)
        rates = percent(row["hit_rate"]), percent(row["late_share"])
        table.add_row(str(row["layer"]), *times, *by_cause, *rates)
    return table


def slowest(found: Mapping[str, Any]) -> RenderableType:
    """The slowest tokens and why."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="the slowest tokens",
                  title_justify="left", title_style="bold")  # fmt: skip
    for name in ("request", "token", "ms"):
        table.add_column(name, justify="right")
    table.add_column("cause")
    table.add_column("the hop that made it slow", overflow="fold")
    for row in found["slowest"]:
        cause = Text(row["cause"], style=COLOURS[row["cause"]])
        place = str(row["request"]), str(row["index"]), f"{row['wall_ms']:.1f}"
        table.add_row(*place, cause, row["why"])
    return table


def panel(verdict: Verdict) -> RenderableType:
    """The verdict, and what each change would gain."""
    parts: list[RenderableType] = [Text(verdict.sentence, style="bold")]
    if gains := [r for r in verdict.remedies if r.gain >= 0.01]:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for remedy in gains:
            table.add_row(f"{remedy.gain:+.0%}", remedy.change)
        parts += [Text("\nexpected gain in tokens/s, each alone:", style="dim"), table]
    return Panel(Group(*parts), title=f"verdict: {verdict.cause.replace('_', ' ')}",
                 title_align="left", padding=(1, 2))  # fmt: skip


def spark(values: list[float]) -> str:
    """Values as a line of blocks, the largest as high as there is."""
    blocks = "▁▂▃▄▅▆▇█"
    high = max(values, default=0.0) or 1.0
    return "".join(blocks[min(int(value / high * 8), 7)] for value in values)


def live(found: Mapping[str, Any], verdict: Verdict, width: int) -> Iterator[RenderableType]:
    """What `--follow` shows of the latest tokens."""
    times = [token["wall_ms"] for token in found["tokens"] if token["index"] > 0][-width:]
    yield heading(found)
    yield Text(f"\n{spark(times)}  {times[-1]:.1f} ms" if times else "", style="cyan")
    yield causes(found)
    yield panel(verdict)  # before the layers, of which a terminal may not have room for all
    yield layers(found)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
