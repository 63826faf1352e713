"""The doctor's curve of a drive, and a plan's speed over memory, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.forecast.forecast import Forecast
from common.forecast.machine import Drive

OURS, LINE = "#4c72b0", "#dd8452"


def draw_drive(drive: Drive, path: Path) -> None:
    """Speed over the size of a read, for each depth, and the cost model's line."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    depths = sorted({int(point["depth"]) for point in drive.points})
    sizes = sorted({int(point["read_bytes"]) for point in drive.points})
    for place, depth in enumerate(depths):
        own = [p for p in drive.points if p["depth"] == depth]
        own.sort(key=lambda point: point["read_bytes"])
        across, up = ([p[key] for p in own] for key in ("read_bytes", "bytes_per_s"))
        axes.plot(
            [size / 1024 for size in across], [speed / 1e9 for speed in up], "o-", color=OURS,
            alpha=(place + 1) / len(depths), label=f"{depth} in flight",
        )  # fmt: skip
    modelled = [size / drive.seconds(1, size) / 1e9 for size in sizes]
    cost = f"{drive.read_us:.1f} µs + {drive.byte_ns * 1.024:.2f} µs a KiB"
    axes.plot([size / 1024 for size in sizes], modelled, "--", color=LINE, label=cost)
    axes.set_xscale("log", base=2)
    axes.set_xticks([size / 1024 for size in sizes], [f"{size // 1024}" for size in sizes])
    axes.set_xlabel("KiB in a read")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"reads of {drive.source}", fontsize=11)
    figure.savefig(path, dpi=120)


def draw_plan(name: str, rows: Sequence[Forecast], knee: Forecast | None, path: Path) -> None:
    """Tokens per second over memory, with their range."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [(row.memory_bytes / 1e9, row.speed.tokens_per_s) for row in rows if row.speed]
    memory = [size for size, _ in found]
    axes.fill_between(memory, [one.low for _, one in found], [one.high for _, one in found],
                      color=OURS, alpha=0.2, label="range")  # fmt: skip
    axes.plot(memory, [one.expected for _, one in found], "o-", color=OURS, label="warm")
    if knee is not None and knee.speed is not None:
        axes.plot(knee.memory_bytes / 1e9, knee.speed.tokens_per_s.expected, "D", color=LINE,
                  markersize=9, label=f"knee: {knee.memory_bytes / 1e9:.2f} GB")  # fmt: skip
    axes.set_xlabel("memory, GB")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: what to expect", fontsize=11)
    figure.savefig(path, dpi=120)
