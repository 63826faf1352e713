"""inflash convert SRC DST: a Hugging Face checkpoint becomes a store. Thin: common/model/convert.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C (run it again to
resume).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table

from common.errors import UserError
from common.model.convert import ConversionPlan, Result, convert, plan_conversion
from common.store.partial import partial_of

_ERR = Console(stderr=True, highlight=False)


class _Bar:
    """A progress bar on stderr that starts at what was done already."""

    def __init__(self) -> None:
        self._started = False
        self._progress = Progress(
            TextColumn("converting"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=_ERR,
        )

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._started = True
        self._progress.start()
        self._task = self._progress.add_task("", total=total_bytes, completed=done_bytes)

    def advance(self, written_bytes: int) -> None:
        self._progress.advance(self._task, written_bytes)

    def note(self, sentence: str) -> None:
        _ERR.print(sentence, soft_wrap=True)

    def stop(self) -> None:
        if self._started:  # it would print an empty line before a refusal
            self._progress.stop()


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--placement",
    metavar="TRACE",
    type=click.Path(path_type=Path),
    help="Put neurons side by side that this trace (python -m scripts.activations) asks for"
    " together: fewer, larger reads.",
)
@click.option(
    "--predictors",
    metavar="STORE",
    type=click.Path(path_type=Path),
    help="Take along what `inflash fit` made in this other store of the same checkpoint.",
)
@click.option(
    "--bundles",
    type=click.Choice(["float", "int8", "int4"]),
    default="float",
    show_default=True,
    help="Number format of the feed-forward weights on flash and in the cache: as in the"
    " checkpoint, or packed to 8 or about 5 bits a number. What that loses is printed;"
    " `inflash eval --against` measures it in perplexity.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="The plan or the result as JSON on stdout.")
def main(
    src: Path,
    dst: Path,
    placement: Path | None,
    predictors: Path | None,
    bundles: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert the Hugging Face checkpoint SRC into the store DST.

    Stopped at any moment, it goes on where it was when run again.
    """
    try:
        if dry_run:
            _show_plan(plan_conversion(src, dst, placement, predictors, bundles), dst, as_json)
        else:
            _convert(src, dst, placement, predictors, bundles, as_json)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        kept = f"{partial_of(dst)} is kept" if partial_of(dst).is_dir() else "nothing was written"
        _ERR.print(f"stopped; {kept}: run the same command again to resume", soft_wrap=True)
        sys.exit(130)


def _convert(
    src: Path,
    dst: Path,
    placement: Path | None,
    predictors: Path | None,
    bundles: str,
    as_json: bool,
) -> None:
    bar = _Bar()
    try:
        result = convert(src, dst, bar, placement, predictors, bundles)
    finally:
        bar.stop()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        if result.weight_error is not None:
            click.echo(_loss(result, bundles))
        click.echo(_summary(result))


def _loss(result: Result, bundles: str) -> str:
    some = " of the layers packed in this run" if result.bytes_resumed else ""
    return (
        f"{bundles} bundles: weight error{some} {result.weight_error:.2%} (root mean square, of"
        f" the weights'), worst in layer {result.worst_layer}: {result.weight_error_worst:.2%}"
    )


def _summary(result: Result) -> str:
    rate = result.bytes_written / max(result.seconds, 1e-9) / 1e9
    resumed = f" ({decimal(result.bytes_resumed)} before)" if result.bytes_resumed else ""
    return (
        f"wrote {result.store}: {decimal(result.bytes_written)}{resumed} in"
        f" {result.seconds:.1f} s, {rate:.2f} GB/s, store {result.id}."
        f" Next: inflash serve {result.store}"
    )


def _show_plan(plan: ConversionPlan, dst: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(plan)))
        return
    table = Table("plan", f"{plan.source} → {dst}", box=None)
    rows = {
        "family": plan.family,
        "activation": plan.activation,
        "number format": plan.dtype,
        "bundles": plan.bundles,
        "layers": f"{plan.layers}",
        "neurons": f"{plan.neurons:,} a layer",
        "hidden": f"{plan.hidden:,}",
        "bundle": f"{plan.bundle_bytes:,} bytes",
        "stride": f"{plan.stride_bytes:,} bytes, {plan.padding_share:.1%} padding",
        "FFN, on flash": decimal(plan.ffn_bytes),
        "resident, in memory": decimal(plan.resident_bytes),
        "disk needed": decimal(plan.disk_needed_bytes),
        "disk free": decimal(plan.disk_free_bytes),
        "order": f"by {plan.placement}, {plan.placement_tokens:,} tokens"
        if plan.placement
        else "the checkpoint's",
        "predictors": f"those of {plan.predictors}" if plan.predictors else "none yet",
        "tokenizer": "yes" if plan.tokenizer else "none: token ids only",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    if plan.disk_needed_bytes > plan.disk_free_bytes:
        click.echo("There is too little disk for it.")


if __name__ == "__main__":
    main(prog_name="inflash convert")
