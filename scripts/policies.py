"""Replays a recorded trace through every cache policy and the optimum: a table and a plot.

Thin: the format and the replay are common/replay.py, the policies are common/policy.py. With a
store it also counts reads: neighbours on flash that are missed together are one.

Exit status: 0 done, 1 no trace, or it could not be replayed or written, 2 wrong usage, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.errors import UserError
from common.model.placement import check_fits, count_reads, missed
from common.outputs import check_output, check_picture, sentences
from common.policy import NEVER_USED, Decay, Keys, Window
from common.replay import (
    SCOPES,
    Contender,
    Outcome,
    Trace,
    load_trace,
    replay,
)
from common.store.store import Store

_ERR = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class FirstIn:
    """A control: the neuron that was read first leaves first. Only with keys that are forgotten."""

    def used(self, keys: Keys, now: int) -> Keys:
        return np.where(keys == NEVER_USED, float(now), keys)

    def floor(self, now: int) -> float:
        return NEVER_USED


@dataclass(frozen=True)
class Reading:
    """What a token reads of one store, with a cache whose policy is decay, slots by use."""

    store: str
    share: float  # of the FFN's neurons, as slots
    misses_per_token: float
    reads_per_token: float

    @property
    def bundles_per_read(self) -> float:
        return self.misses_per_token / max(self.reads_per_token, 1e-9)


OPTIMUM = Contender("optimum", None)
CONTENDERS = (
    OPTIMUM,
    *(Contender(f"window {tokens}", Window(tokens)) for tokens in (4, 5, 16)),
    Contender("window auto", Window(None)),
    *(Contender(f"decay {tokens}", Decay(float(tokens))) for tokens in (4, 8, 16, 32, 64)),
    Contender("decay 8 forgetting", Decay(8.0), forget=True),
    Contender("first in", FirstIn(), forget=True),
)
# Of what is no candidate; the ten others take matplotlib's ten colours.
_STYLES = {
    OPTIMUM.name: {"color": "black", "linestyle": "--"},
    "first in": {"color": "grey", "linestyle": ":"},
}
SIZES = "5,10,15,20,25,30,40,50"
NOTES = {
    "equal": "as many slots in every layer",
    "use": "slots of a layer in proportion to what it is asked for",
    "global": "all layers share the slots",
}


def _sizes(context: click.Context, parameter: click.Parameter, text: str) -> list[float]:
    """Percent, as "5,10,50"; returns shares."""
    try:
        shares = [float(word) / 100 for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of percent: write 5,10,50") from None
    if not all(0 < share <= 1 for share in shares):
        raise click.BadParameter(f"{text!r}: a size is above 0 and up to 100 percent of the FFN")
    return sorted(set(shares))


@click.command()
@click.argument("path", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "--sizes",
    "shares",
    default=SIZES,
    show_default=True,
    callback=_sizes,
    help="Caches, in percent of the FFN.",
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="Who shares slots; may be repeated. [default: all]",
)
@click.option(
    "--policy",
    "names",
    multiple=True,
    type=click.Choice([contender.name for contender in CONTENDERS]),
    help="May be repeated; the optimum always runs. [default: all]",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    metavar="TOKENS",
    help="Tokens not counted. [default: a tenth, at least the largest window]",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Also count reads in this store of the trace's checkpoint; may be repeated.",
)
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write every figure here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw misses over size: a .png.")
def main(
    path: Path,
    shares: list[float],
    scopes: tuple[str, ...],
    names: tuple[str, ...],
    warmup: int | None,
    stores: tuple[Path, ...],
    as_json: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Replay TRACE through every cache policy and the optimum, for several sizes of cache."""
    chosen = [c for c in CONTENDERS if not names or c is OPTIMUM or c.name in names]
    try:
        if as_json:
            check_output(as_json)
        if plot:
            check_picture(plot)
        trace = load_trace(path)
        warmup = warmup_tokens(trace, chosen) if warmup is None else warmup
        opened = [Store.open(store) for store in stores]
        for store in opened:
            check_fits(trace, store.geometry.layers, store.geometry.neurons)
        outcomes = _replay_all(trace, chosen, scopes or SCOPES, shares, warmup)
        readings = count_all_reads(trace, opened, shares, warmup)
        _show(trace, outcomes, warmup)
        _show_reads(readings)
        if as_json:
            report = json.dumps(_report(trace, outcomes, readings, warmup), indent=1)
            with sentences(f"{as_json} cannot be written"):
                as_json.write_text(report, encoding="utf-8")
        if plot:
            with sentences(f"{plot} cannot be written"):
                _draw(outcomes, plot)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _ERR.print("stopped before the end: there are no figures")
        sys.exit(130)


def warmup_tokens(trace: Trace, contenders: Sequence[Contender]) -> int:
    """Tokens not counted by default: a tenth, and at least the largest window."""
    windows = [c.policy.tokens for c in contenders if isinstance(c.policy, Window)]
    return max(-(-trace.tokens // 10), *(tokens or 0 for tokens in windows), 0)


def _replay_all(
    trace: Trace, chosen: Sequence[Contender], scopes: Sequence[str], shares: list[float],
    warmup: int,
) -> list[Outcome]:  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    outcomes = []
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=_ERR) as bar:
        task = bar.add_task("", total=len(chosen) * len(scopes) * trace.tokens)
        for scope in scopes:
            for contender in chosen:
                bar.update(task, description=f"{contender.name}, {scope}")
                outcomes += replay(
                    trace, contender, scope, shares, warmup, lambda done: bar.advance(task, done)
                )
    return outcomes


def count_all_reads(
    trace: Trace, stores: Sequence[Store], shares: Sequence[float], warmup: int
) -> list[Reading]:
    """What tokens after `warmup` read of each store, for each size of cache."""
    if not stores:
        return []
    totals = np.zeros((len(stores), len(shares), 2), np.int64)
    for layer in range(trace.layers):
        orders = [store.order(layer) for store in stores]
        for column, share in enumerate(shares):
            found = missed(trace, layer, share)[warmup:]
            for row, order in enumerate(orders):
                natural = np.arange(trace.neurons, dtype=np.int32)
                reads = count_reads(found, natural if order is None else order)
                totals[row, column] += (np.count_nonzero(found), reads)
    tokens = trace.tokens - warmup
    return [
        Reading(str(store.path), share, *(totals[row, column] / tokens).tolist())
        for row, store in enumerate(stores)
        for column, share in enumerate(shares)
    ]


def over_optimum(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Misses over those of the optimum in the same scope and size; None where that has none."""
    best = {(o.scope, o.share): o.misses_per_asked for o in outcomes if o.policy == OPTIMUM.name}
    bounds = [best[o.scope, o.share] for o in outcomes]
    return [o.misses_per_asked / b if b else None for o, b in zip(outcomes, bounds, strict=True)]


def _report(
    trace: Trace, outcomes: Sequence[Outcome], readings: Sequence[Reading], warmup: int
) -> dict[str, Any]:
    return {
        "trace": {
            "names": trace.names, "layers": trace.layers, "neurons": trace.neurons,
            "tokens": trace.tokens, "stride_bytes": trace.stride_bytes,
        },
        "warmup_tokens": warmup,
        "outcomes": [
            dataclasses.asdict(outcome) | {"over_optimum": ratio}
            for outcome, ratio in zip(outcomes, over_optimum(outcomes), strict=True)
        ],
        "readings": [
            dataclasses.asdict(reading) | {"bundles_per_read": reading.bundles_per_read}
            for reading in readings
        ],
    }  # fmt: skip


def _show(trace: Trace, outcomes: Sequence[Outcome], warmup: int) -> None:
    asked = sum(len(ids) for ids in trace.ids) / trace.tokens
    share = asked / trace.layers / trace.neurons
    console = Console()
    console.print(
        f"{trace.layers} layers of {trace.neurons:,} neurons, {trace.tokens:,} tokens of which"
        f" {warmup:,} warm up; a token asks for {asked:,.0f} neurons ({trace.names}), {share:.1%}"
        f" of the FFN, {decimal(int(asked * trace.stride_bytes))}.",
        soft_wrap=True,
    )
    ratios = dict(zip(outcomes, over_optimum(outcomes), strict=True))

    def misses(outcome: Outcome) -> str:
        ratio = ratios[outcome]
        return f"{outcome.misses_per_asked:.3f}" + (f" ×{ratio:.2f}" if ratio else "")

    def read(outcome: Outcome) -> str:
        return f"{decimal(int(outcome.bytes_per_token))} {outcome.ffn_share_per_token:.2%}"

    def held(outcome: Outcome) -> str:
        return f"{outcome.held_share:.1%}"

    for scope in dict.fromkeys(outcome.scope for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scope == scope]
        windows = [o for o in mine if o.policy.removeprefix("window ").isdecimal()]
        for title, cell, rows in (
            (f"Misses per asked neuron, × the optimum's; {scope}: {NOTES[scope]}", misses, mine),
            (f"Read per token, and as a share of the FFN; {scope}", read, mine),
            (f"Share of the FFN that a window holds on average; {scope}", held, windows),
        ):
            if rows:
                console.print(f"\n{title}", soft_wrap=True)
                console.print(_table(rows, cell))


def _show_reads(readings: Sequence[Reading]) -> None:
    if not readings:
        return
    table = Table("store", box=None)
    for share in dict.fromkeys(reading.share for reading in readings):
        table.add_column(f"{share * 100:g} %", justify="right", no_wrap=True)
    for store in dict.fromkeys(reading.store for reading in readings):
        mine = [reading for reading in readings if reading.store == store]
        table.add_row(store, *(f"{r.reads_per_token:,.1f} ×{r.bundles_per_read:.3f}" for r in mine))
    console = Console()
    title = "\nReads per token, × bundles per read; decay, slots by use, gaps not read over"
    console.print(title, soft_wrap=True)
    console.print(table)


def _table(outcomes: Sequence[Outcome], cell: Callable[[Outcome], str]) -> Table:
    """A row per policy, a column per size."""
    table = Table(box=None)
    table.add_column("policy", no_wrap=True)
    for share in dict.fromkeys(outcome.share for outcome in outcomes):
        table.add_column(f"{share * 100:g} %", justify="right", no_wrap=True)
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        table.add_row(policy, *(cell(o) for o in outcomes if o.policy == policy))
    return table


def _draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """A panel per scope: misses per asked neuron over the size of the cache."""
    scopes = list(dict.fromkeys(outcome.scope for outcome in outcomes))
    page = Figure(figsize=(5 * len(scopes), 4.5), layout="constrained")
    panels = page.subplots(1, len(scopes), sharey=True, squeeze=False)[0]
    for panel, scope in zip(panels, scopes, strict=True):
        for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
            mine = [o for o in outcomes if o.scope == scope and o.policy == policy]
            style = _STYLES.get(policy, {})
            x, y = [o.share * 100 for o in mine], [o.misses_per_asked for o in mine]
            panel.plot(x, y, marker=".", label=policy, **style)
        panel.set(title=f"{scope}: {NOTES[scope]}", xlabel="cache, % of the FFN", ylim=(0, None))
        panel.title.set_fontsize("medium")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("misses per asked neuron")
    panels[-1].legend(fontsize="small")
    page.savefig(path, dpi=150)


if __name__ == "__main__":
    main(prog_name="python -m scripts.policies")
