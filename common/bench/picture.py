"""The report as a picture: the contenders, where a token's time goes, the ablation, the growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.filesize import decimal

from common.bench import names
from common.bench.figures import Figures
from common.bench.report import TITLES, asked, by_clients, ran
from common.bench.studies import PREFILL_FIELD

OURS, THEIRS, FREE = "#c44e52", "#4c72b0", "#a8b8d0"
SEGMENTS = {
    "computing": "#4c72b0",
    "waiting for flash": "#dd8452",
    "waiting for the predictor": "#8c8c8c",
    "waiting for the reader": "#c9c9c9",
}
ROW_INCHES = 0.46
FRAME_INCHES = 1.1  # title and axis of a panel
WIDTH_INCHES = 9.0


def draw_report(found: Figures, path: Path) -> None:
    """Writes the report's object (common/bench/run.py) as an image; the suffix of `path` says of
    which kind."""
    panels: list[tuple[Callable[[Axes, Figures], None], float]] = [
        (_contenders, len(asked(found))),
        (_token, 4),
    ]
    if _prefilled(found):
        panels.append((_prefill, len(_prefilled(found))))
    if _served(found):
        panels.append((_clients, 5))
    if any(ran(row) for row in found.get("ablation", ())):
        panels.append((_ablation, len(found["ablation"])))
    if any(ran(row) for row in found.get("growth", ())):
        panels.append((_growth, 6))
    heights = [FRAME_INCHES + ROW_INCHES * rows for _, rows in panels]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (draw, _), one in zip(panels, axes, strict=True):
        draw(one, found)
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found['shape']} in {decimal(found['cap_bytes'])} of memory"
        f" (checkpoint {decimal(found['checkpoint_bytes'])})",
        fontsize=13, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _contenders(axes: Axes, found: Figures) -> None:
    _title(axes, "time for a token, median and quartiles", "ms, logarithmic")
    _logarithmic(axes)
    labels, times = [], []
    for place, (name, figures) in enumerate(asked(found).items()):
        labels.append(_row_title(name))
        if not ran(figures):
            continue
        _bar_with_quartiles(axes, place, figures, _colour(name))
        read = figures["bytes_per_token"]
        said = "" if read is None else f", {decimal(int(read))} read"
        _label(axes, figures["spread_ms"]["quartiles"][1], place,
               f"{figures['ms_per_token']:,.1f} ms{said}")  # fmt: skip
        times.append(figures["ms_per_token"])
    axes.set_xlim(min(times) / 2.5, max(times) * 12)
    for place, figures in enumerate(asked(found).values()):
        if not ran(figures):
            what = "absent" if "absent" in figures else "failed"
            _label(axes, axes.get_xlim()[0], place, what, colour="grey")
    _rows(axes, labels)


def _row_title(name: str) -> str:
    return TITLES[name] + ("\n(no cap)" if name in names.UNCAPPED else "")


def _colour(name: str) -> str:
    return OURS if name in names.OURS else FREE if name in names.UNCAPPED else THEIRS


def _token(axes: Axes, found: Figures) -> None:
    _title(axes, "where a token's time goes, and its floors", "ms, mean")
    floors = found["floors"]
    larger = max(floors["read_ms"], floors["compute_ms"])
    rows = {"look-ahead off": found["serial"], "inflash": found["contenders"]["inflash"]}
    for place, figures in enumerate(rows.values()):
        left = 0.0
        for (name, colour), ms in zip(SEGMENTS.items(), _segments(figures), strict=True):
            axes.barh(place, ms, left=left, color=colour, label=name if place == 0 else None)
            left += ms
        _label(axes, left, place, f"{left:,.1f} ms")
    for place, (name, colour) in enumerate(
        (("read_ms", SEGMENTS["waiting for flash"]), ("compute_ms", SEGMENTS["computing"])),
        start=len(rows),
    ):
        axes.barh(place, floors[name], color=colour, alpha=0.45, hatch="///", edgecolor="white")
        speed = floors["drive_bytes_per_s" if name == "read_ms" else "memory_bytes_per_s"]
        _label(axes, larger, place, f"{floors[name]:,.1f} ms at {speed / 1e9:.2f} GB/s")
    axes.axvline(larger, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _rows(axes, [*rows, "floor: reads", "floor: products"])


def _segments(figures: Figures) -> list[float]:
    """Milliseconds of each of SEGMENTS."""
    waits = figures["waits_ms"] or {"flash": figures["stall_ms"], "predictor": 0.0, "queue": 0.0}
    computing = max(0.0, figures["decode_ms"] - figures["stall_ms"])
    return [computing, waits["flash"], waits["predictor"], waits["queue"]]


def _prefilled(found: Figures) -> Figures:
    """The contenders that have a time for the long prompt."""
    rows = found.get("prefill", {}).get("contenders", {})
    return {name: row for name, row in rows.items() if "failed" not in row}


def _prefill(axes: Axes, found: Figures) -> None:
    tokens = found["prefill"]["tokens"]
    _title(axes, f"time to the first token of a prompt of {tokens} tokens", "s")
    rows = _prefilled(found)
    for place, (name, row) in enumerate(rows.items()):
        seconds = row[PREFILL_FIELD] / 1e3
        axes.barh(place, seconds, color=_colour(name))
        _label(axes, seconds, place, f"{seconds:,.2f} s")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.2)
    _rows(axes, [_row_title(name) for name in rows])


def _served(found: Figures) -> dict[str, list[Figures]]:
    return {name: rows for name, rows in by_clients(found).items() if "failed" not in rows[0]}


def _clients(axes: Axes, found: Figures) -> None:
    _title(axes, "clients of inflash at once", "clients")
    most = 0.0
    styles = ("o-", -12), ("s--", 6), ("^:", -12)  # and how far above its point a figure stands
    for (name, rows), (style, above) in zip(_served(found).items(), styles, strict=False):
        counts, speeds = [row["n"] for row in rows], [row["tokens_per_s"] for row in rows]
        axes.plot(counts, speeds, style, color=OURS, label=TITLES[name])
        for count, speed in zip(counts, speeds, strict=True):
            axes.annotate(f"{speed:,.2f}", (count, speed), textcoords="offset points",
                          xytext=(6, above), fontsize=8)  # fmt: skip
        axes.set_xticks(counts)
        most = max(most, *speeds)
    axes.legend(loc="upper left", fontsize=8)
    axes.margins(x=0.08)  # the last figure stands beside its point
    axes.set_ylabel("tokens/s together")
    axes.set_ylim(0, 1.15 * most)
    axes.grid(alpha=0.3)


def _ablation(axes: Axes, found: Figures) -> None:
    _title(axes, "what each step brings, over those before it", "ms a token, logarithmic")
    _logarithmic(axes)
    rows = found["ablation"]
    times = [row["ms_per_token"] for row in rows if ran(row)]
    axes.set_xlim(min(times) / 2.5, max(times) * 8)
    for place, row in enumerate(rows):
        if not ran(row):
            what = "not measured" if "absent" in row else "failed"
            _label(axes, axes.get_xlim()[0], place, what, colour="grey")
            continue
        helps = row.get("verdict", "helps") == "helps"
        _bar_with_quartiles(axes, place, row, OURS if place == len(rows) - 1 else THEIRS,
                            alpha=1.0 if helps else 0.5)  # fmt: skip
        gain = f", {row['gain']:.2f}×" if "gain" in row else ""
        read = row["bytes_per_token"]
        said = "" if read is None else f", {decimal(int(read))} read"
        _label(axes, row["spread_ms"]["quartiles"][1], place,
               f"{row['ms_per_token']:,.1f} ms{gain}{said}")  # fmt: skip
    _rows(axes, [row["step"] for row in rows])


def _growth(axes: Axes, found: Figures) -> None:
    _title(axes, "growth with the model, 24 % of the FFN cached", "checkpoint, GB")
    rows = [row for row in found["growth"] if ran(row)]
    sizes = [row["checkpoint_bytes"] / 1e9 for row in rows]
    axes.plot(sizes, [row["ms_per_token"] for row in rows], "o-", color=OURS)
    axes.set_ylabel("ms a token", color=OURS)
    for size, row in zip(sizes, rows, strict=True):
        axes.annotate(row["shape"], (size, row["ms_per_token"]), textcoords="offset points",
                      xytext=(6, -12), fontsize=8)  # fmt: skip
    if all(row["bytes_per_token"] is not None for row in rows):
        right = axes.twinx()
        read = [row["bytes_per_token"] / 1e6 for row in rows]
        right.plot(sizes, read, "s--", color=THEIRS)
        right.set_ylabel("MB read a token", color=THEIRS)
        right.set_ylim(bottom=0)
        right.spines[["top"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _bar_with_quartiles(
    axes: Axes, place: int, figures: Figures, colour: str, alpha: float = 1.0
) -> None:
    time = figures["ms_per_token"]
    low, high = figures["spread_ms"]["quartiles"]
    axes.barh(place, time, color=colour, alpha=alpha)
    whiskers = [[max(0.0, time - low)], [max(0.0, high - time)]]
    axes.errorbar(time, place, xerr=whiskers, color="black", linewidth=1, capsize=3)


def _label(axes: Axes, x: float, place: float, text: str, colour: str = "black") -> None:
    axes.annotate(text, (x, place), textcoords="offset points", xytext=(7, 0), va="center",
                  fontsize=9, color=colour)  # fmt: skip


def _rows(axes: Axes, labels: list[str]) -> None:
    """Names the rows, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _title(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    grid: dict[str, Any] = {"alpha": 0.3, "axis": "x"}
    axes.grid(**grid)
    axes.set_axisbelow(True)
