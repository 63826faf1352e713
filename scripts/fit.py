"""`inflash fit STORE`: learned predictors for a store, from any text, without a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TimeElapsedColumn as ElapsedColumn
from rich.table import Table
from transformers.utils import logging

from common.config import parse_size
from common.errors import UserError
from common.launch import CHECKOUT
from common.learn.fitted import FOLDER, KINDS, fingerprint, load_part, publish, save_part
from common.learn.layer import Fit, Goal, Phase, fit_layer
from common.learn.picture import draw_report
from common.learn.recording import Recording, record, text_digest
from common.learn.reuse import misses_of
from common.learn.windows import windows_of
from common.lowrank import PICTURE, PREDICTORS, REPORT, Kind, predictor_problem
from common.outputs import check_output, sentences
from common.store.store import Store

TEXT = ("README.md", "ARCHITECTURE.md", "docs", "inflash", "common", "services", "scripts", "tests")
MARGIN = 0.2  # of the distance to 1, by which recall is chosen above what was asked for
NAMED_SHARE = 0.85  # of --named, that a rank must do with on our text: other text asks for more
SAME_SHARE = 0.4  # of the size budget; look-ahead has three times the features
WEIGHT = {"closed form": 0.4, "refinement": 0.6}  # of a layer's time, for the progress bar

_ERR = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Options:
    """What decides the result, with the store and the text."""

    recall_same: float
    recall_ahead: float
    named: float
    size: float  # share of a layer's FFN bytes
    passes: float

    def goal(self, kind: Kind, layer_bytes: int) -> Goal:
        share = SAME_SHARE if kind == "same" else 1 - SAME_SHARE
        return Goal(self.recall(kind), self.named * NAMED_SHARE,
                    int(self.size * share * layer_bytes))  # fmt: skip

    def recall(self, kind: Kind) -> float:
        """Aimed at a little above what was asked for, so that other text reaches it, too."""
        asked = self.recall_same if kind == "same" else self.recall_ahead
        return asked + MARGIN * (1 - asked)


def _layer_numbers(_: Any, __: Any, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first)):
        raise click.BadParameter(f"{text!r} is no range of layers: write 0-15, or 7")
    return int(first), int(last or first)


def _share(_: Any, __: Any, text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not share > 0 or not text.endswith("%"):
        raise click.BadParameter(f"{text!r} is no share: write 25%")
    return share


def _bytes(_: Any, __: Any, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File or folder of text like that which the model will see; may be repeated."
    " [default: this project's own sources and documents]",
)
@click.option(
    "--tokens",
    default=65_536,
    show_default=True,
    type=click.IntRange(1024),
    help="How many to run the model over.",
)
@click.option(
    "--length",
    default=512,
    show_default=True,
    type=click.IntRange(16),
    help="Of a window of text, in tokens.",
)
@click.option(
    "--recall-same",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0.5, 0.9999),
    help="Wanted of the same layer's predictor.",
)
@click.option(
    "--recall-ahead",
    default=0.97,
    show_default=True,
    type=click.FloatRange(0.5, 0.9999),
    help="Wanted one layer ahead.",
)
@click.option(
    "--named",
    default=2.0,
    show_default=True,
    type=click.FloatRange(1.0),
    help="Neurons that a predictor may name for each one that fires.",
)
@click.option(
    "--size",
    default="25%",
    show_default=True,
    callback=_share,
    help="Of a layer's predictors in memory, at most, as a share of its FFN weights.",
)
@click.option(
    "--passes",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Of refinement over the text; 0: closed form only.",
)
@click.option(
    "--layers",
    callback=_layer_numbers,
    metavar="A-B",
    help="Fit only these; other machines fit the others.",
)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for the recording. [default: STORE/fit]"
)
@click.option(
    "--memory",
    "keep_bytes",
    default="1GB",
    show_default=True,
    callback=_bytes,
    help="For weights that stay in memory while the model runs over the text.",
)
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
@click.option("--again", is_flag=True, help="Fit anew what is fitted already.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def main(store: Path, texts: tuple[Path, ...], tokens: int, length: int, layers: Any,
         work: Path | None, keep_bytes: int, threads: int | None, again: bool, as_json: bool,
         **options: Any) -> None:  # fmt: skip
    """Fit predictors for STORE: which neurons will fire, for a layer and one layer ahead.

    Runs the model over the text, a layer's weights at a time (it need not fit in memory), records
    on disk what each layer was given and what fired, and fits each layer: closed form first, then
    refinement where it helps. Writes predictors.safetensors, predictors.json and predictors.png
    into STORE; `inflash serve` uses them from then on.

    Stopped at any moment, it goes on after the last finished layer when run again. To share the
    work, run it on several machines with copies of STORE and the same text, each with its own
    --layers; copy their STORE/fit/layer-*.safetensors together and run it once without --layers.

    \b
      inflash fit my-store --text books/ --tokens 200000
      inflash fit my-store --layers 0-15
    """
    logging.disable_progress_bar()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        chosen = Options(**options)
        with sentences(f"fitting {store} stopped", "run the same command again to go on"):
            report = fit(Store.open(store), texts, tokens, length, chosen, layers,
                         work or store / FOLDER, keep_bytes, again)  # fmt: skip
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _ERR.print("stopped; finished layers are kept: run the same command again to go on")
        sys.exit(130)
    if report is not None:
        if as_json:
            print(json.dumps(report))
        else:
            show(report, store)


def fit(store: Store, texts: Sequence[Path], tokens: int, length: int, options: Options,
        layers: tuple[int, int] | None, work: Path, keep_bytes: int,
        again: bool) -> dict[str, Any] | None:  # fmt: skip
    """The whole fit; the report, or None while other layers are missing."""
    began = time.monotonic()
    count = store.geometry.layers
    first, last = layers or (0, count - 1)
    if last >= count:
        raise UserError(f"--layers {first}-{last}: the model has layers 0 to {count - 1}")
    windows = windows_of(store, texts or [CHECKOUT / name for name in TEXT], tokens, length)
    if windows.note:
        _ERR.print(f"note: {windows.note}", soft_wrap=True)
    mark = fingerprint(store, text_digest(windows.ids), asdict(options))
    if not again and (report := _finished(store, mark)):
        _ERR.print("fitted already, with this text and these options (--again fits anew)")
        return report
    check_output(store.path / PREDICTORS)
    wanted = range(first, last + 1)
    missing = [n for n in wanted if again or load_part(store, n, mark) is None]
    if missing:
        _fit_layers(store, windows.ids, wanted, missing, options, work, keep_bytes, mark)
    parts = [load_part(store, number, mark) for number in range(count)]
    found = [part for part in parts if part is not None]
    if len(found) < count:
        lacking = [number for number, part in enumerate(parts) if part is None]
        _ERR.print(
            f"layers {first} to {last} are fitted; missing: {_ranges(lacking)}. Fit them with"
            f" --layers, here or on another machine, and copy its layer-*.safetensors to"
            f" {store.path / FOLDER}; then run this again without --layers",
            soft_wrap=True,
        )
        return None
    facts = {
        "model": store.manifest.source,
        "fingerprint": mark,
        "texts": [str(path) for path in texts] or ["this project's own"],
        "tokens": int(windows.ids.size),
        "options": asdict(options),
        "seconds": round(time.monotonic() - began, 1),
    }
    recalls = {kind: options.recall(kind) for kind in KINDS}
    report = publish(store, found, recalls, facts)
    draw_report(report, store.path / PICTURE)
    shutil.rmtree(store.path / FOLDER, ignore_errors=True)
    return report


def _finished(store: Store, mark: str) -> dict[str, Any] | None:
    if predictor_problem(store):
        return None
    report: dict[str, Any] = json.loads((store.path / REPORT).read_bytes())
    return report if report.get("fingerprint") == mark else None


def _fit_layers(store: Store, ids: np.ndarray[Any, Any], wanted: Sequence[int],
                missing: Sequence[int], options: Options, work: Path, keep_bytes: int,
                mark: str) -> None:  # fmt: skip
    """Fits the layers `missing` of those `wanted`, one part after the other.

    Records all that are wanted: a fit that goes on finds the recording that it began with.
    """
    with _bar() as bar:
        task = bar.add_task("running the model", total=ids.size)
        recording = record(
            store, ids, work, layers=wanted, keep_bytes=keep_bytes,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
        task = bar.add_task("fitting", total=len(missing) * len(KINDS))
        for number in missing:
            fits: dict[Kind, Fit] = {}
            for kind in KINDS:
                goal = options.goal(kind, store.geometry.layer_bytes)
                done = float(bar.tasks[task].completed)
                bar.update(task, description=f"fitting layer {number}, {kind}")
                fits[kind] = fit_layer(
                    store, recording, number, kind, goal, options.passes,
                    _stepper(bar, task, done, options.passes),
                )  # fmt: skip
                bar.update(task, completed=done + 1)
            misses = misses_of(recording, number, store.geometry)
            fits["same"] = replace(fits["same"], misses=misses)
            save_part(store, number, fits, mark)
    _discard(recording)


def _stepper(bar: Progress, task: TaskID, done: float, passes: float) -> Any:
    def step(phase: Phase, share: float) -> None:
        before = 0.0 if phase == "closed form" else WEIGHT["closed form"]
        weight = WEIGHT[phase] if passes else 1.0
        bar.update(task, completed=done + before + weight * share)

    return step


def _discard(recording: Recording) -> None:
    """The recording is the largest part of what a fit leaves, and of no use to anything else."""
    for name in recording.files():
        (recording.folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), ElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=_ERR) as bar:
        yield bar


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def show(report: dict[str, Any], path: Path) -> None:
    """The report as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "active", "rank", "recall", "named ÷ active"):
        table.add_column(heading, justify="right")
    for heading in ("rank", "recall", "named ÷ active"):
        table.add_column(f"{heading}, ahead", justify="right")
    for row in report["layers"]:
        same, ahead = row["same"], row["ahead"]
        table.add_row(f"{row['layer']}", f"{row['active']:.1%}", *_cells(same), *_cells(ahead))
    totals = report["totals"]
    table.add_row("all", "", "", *_cells(totals["same"]), "", *_cells(totals["ahead"]))
    console = Console()
    console.print(table)
    console.print(
        f"{report['bytes'] / 1e6:,.1f} MB of predictors, {report['tokens']:,} tokens of text,"
        f" {report['seconds']:.0f} s. Figures are of held-out windows. Next: inflash serve {path}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _cells(fit: dict[str, Any]) -> list[str]:
    rank = [f"{fit['rank']}{'' if fit['refined'] else ' (closed form)'}"] if "rank" in fit else []
    return [*rank, f"{fit['recall']:.1%}", f"{fit['named_per_active']:.2f}"]


if __name__ == "__main__":
    main(prog_name="inflash fit")
