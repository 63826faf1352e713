"""The server's report as tables. The only module that needs rich."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

STATE_STYLES = {"ready": "green", "starting": "yellow", "failing": "red", "lost": "red"}

Report = Mapping[str, Any]


def show(report: Report) -> None:
    """Prints the report."""
    Console().print(tables(report))


def show_live(ask: Callable[[], Report]) -> None:
    """Shows the report of every second until Ctrl-C."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(tables(ask()), auto_refresh=False) as live,
    ):
        while True:
            time.sleep(1.0)
            live.update(tables(ask()), refresh=True)


def tables(report: Report) -> RenderableType:
    """All of the report."""
    store = report["store"]
    heading = Text.assemble("server ", _state(report["state"]), f" · {store['path']}")
    return Group(heading, _services(report["services"]), _facts(report))


def _services(services: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("service", "state"):
        table.add_column(name)
    for name in ("pid", "uptime"):
        table.add_column(name, justify="right")
    table.add_column("counters", style="dim")
    for name, service in services.items():
        counters = ", ".join(f"{k} {v:,}" for k, v in service["counters"].items() if v)
        pid = "" if service["pid"] is None else str(service["pid"])
        table.add_row(name, _state(service["state"]), pid, _time(service["uptime_s"]), counters)
    return table


def _facts(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    store, plan, queue = report["store"], report["plan"], report["queue"]
    settings, counters = report["settings"], report["counters"]
    table.add_row(
        "store",
        f"{store['family']}, {store['layers']} layers × {store['neurons']:,} neurons,"
        f" {store['dtype']}, FFN {_bytes(store['ffn_bytes'])}, id {store['id']}",
    )
    parts = [f"{k.removesuffix('_bytes')} {_bytes(v)}" for k, v in plan.items() if _is_bytes(k)]
    table.add_row("plan", f"{', '.join(parts)}, context {plan.get('context', 0):,} tokens")
    names = ("predictor", "policy", "window", "slots", "extras")
    chosen = [f"{n} {'auto' if settings[n] is None else settings[n]}" for n in names]
    table.add_row("settings", ", ".join(chosen))
    table.add_row(
        "queue",
        f"{queue['running']} running (at most {queue['running_max']}, with"
        f" {queue['room_taken_tokens']:,} of {queue['room_tokens']:,} tokens of KV cache),"
        f" {queue['waiting']} waiting (at most {queue['max']})",
    )
    table.add_row("requests", ", ".join(f"{k} {v:,}" for k, v in counters.items()))
    if report["figures"]["requests"]:
        table.add_row("answers", _figures(report["figures"]))
    return table


def _figures(figures: Mapping[str, Any]) -> str:
    """Of all answers together."""
    seconds = figures["decode_s"]
    whole = seconds["all"] or 1.0
    shares = [f"{k} {100 * s / whole:.0f} %" for k, s in seconds.items() if k != "all"]
    return (
        f"{figures['new_tokens']:,} tokens, {figures['tokens_per_s']:.1f} tokens/s,"
        f" {_bytes(figures['bytes_read'])} read, hit rate {100 * figures['hit_rate']:.1f} %,"
        f" late {100 * figures['late_share']:.1f} %, reused {figures['reused_tokens']:,} of"
        f" {figures['prompt_tokens']:,} prompt tokens; time: {', '.join(shares)}"
    )


def _is_bytes(key: str) -> bool:
    return key.endswith("_bytes")


def _state(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, ""))


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
