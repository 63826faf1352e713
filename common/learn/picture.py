"""The fit's report as a picture: recall and neurons named, by layer, for both predictors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"same": "#4c72b0", "ahead": "#dd8452"}
LABELS = {"same": "same layer", "ahead": "one layer ahead"}


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Writes the report of `inflash fit` (common/learn/fitted.py) as an image; the suffix of
    `path` says of which kind."""
    rows = report["layers"]
    layers = [row["layer"] for row in rows]
    figure = Figure(figsize=(8, 7), layout="constrained")
    recall, named, active = figure.subplots(3, 1, sharex=True)
    for kind, colour in COLOURS.items():
        total = report["totals"][kind]
        recall.plot(
            layers, [100 * row[kind]["recall"] for row in rows], "o-", color=colour,
            label=f"{LABELS[kind]}: {total['recall']:.1%} in all",
        )  # fmt: skip
        named.plot(
            layers, [row[kind]["named_per_active"] for row in rows], "o-", color=colour,
            label=f"{LABELS[kind]}: {total['named_per_active']:.2f} in all",
        )  # fmt: skip
    recall.set_ylabel("recall, %")
    named.set_ylabel("named ÷ active")
    named.axhline(1.0, color="grey", linewidth=0.8)
    active.bar(layers, [100 * row["active"] for row in rows], color="grey")
    active.set_ylabel("active neurons, %")
    active.set_xlabel("layer")
    active.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (recall, named):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"predictors of {report['model']}, held-out text", fontsize=11)
    figure.savefig(path, dpi=120)
