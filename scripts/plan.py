"""inflash plan: what a machine will do with a model, before the model is there. No torch here.

Exit status: 0 done (also where it does not fit: it says so), 1 refused or failed, 2 wrong usage,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from common.cgroup import machine_bytes
from common.config import parse_size
from common.errors import UserError
from common.forecast.behaviour import Behaviour, behaviour_of
from common.forecast.forecast import TOKENS_COLD, Forecast, Forecaster, Range, Speed
from common.forecast.machine import FILE, Machine, load_machine, with_drive
from common.forecast.source import Described, describe
from common.outputs import check_picture
from common.outputs import sentences as saying
from inflash._rundir import default_run_dir

FILE_COLUMNS = 110
CAUSES = ("products", "predictor", "processes", "reads")

_ERR = Console(stderr=True, highlight=False)


def _size(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=option) from None


@click.command()
@click.argument("model")
@click.option(
    "--memory", callback=_size, metavar="SIZE", help="Budget for everything. [default: half of RAM]"
)
@click.option(
    "--drive",
    metavar="PROFILE",
    help="Another drive: a file that `inflash doctor` wrote, or a data sheet's speed and 4 KiB"
    " reads per second, as 3.5GB/s@600k.",
)
@click.option(
    "--machine",
    "machine_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another machine: what `inflash doctor --output FILE` wrote there."
    " [default: this one's, in the run directory]",
)
@click.option(
    "--prompt", type=click.IntRange(1), default=32, show_default=True, metavar="TOKENS",
    help="Of the prompt that the first token waits for.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(1), default=2048, show_default=True, metavar="TOKENS",
    help="Prompt and answer together.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE",
    help="Draw tokens per second over memory; .png, .svg or .pdf.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: str, memory: int | None, drive: str | None, machine_file: Path | None, prompt: int,
    context: int, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Foretell what a machine will do with MODEL: does it fit, how fast, with how much memory.

    MODEL is a store, a checkpoint's folder, a config.json, or a model of the Hub as owner/name (or
    owner/name@revision), of which configuration and safetensors headers are read, and no weight.
    Speeds come from the cost model that `inflash doctor` wrote; without one, memory and disk alone
    are foretold. How sparse the model is and how much its tokens share comes from its fitted store,
    or from what was published of its family.

    `inflash serve STORE --plan` is the plan of a store's memory, line by line, as a server makes
    it.

    \b
      inflash plan facebook/opt-6.7b --memory 8GB
      inflash plan ~/models/opt-6.7b/config.json --memory 8GB --drive 7GB/s@1000k
      inflash plan ~/stores/opt-6.7b --memory 7GB --plot knee.png
    """
    try:
        with saying(f"the forecast of {model} stopped"):
            if plot:
                check_picture(plot)
            described = describe(model)
            machine = _machine(machine_file, drive)
            behaviour = behaviour_of(described)
            forecaster = Forecaster(described, behaviour, machine, context, prompt)
            asked = memory or machine_bytes() // 2
            found = forecaster.at(asked)
            rows = forecaster.table(asked)
            knee = forecaster.knee
            if plot:
                _draw(described, forecaster, rows, knee, plot)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print(json.dumps(as_object(described, behaviour, forecaster, found, rows, knee, machine)))
    else:
        show(described, behaviour, forecaster, found, rows, knee, machine)


def _machine(file: Path | None, drive: str | None) -> Machine | None:
    path = file or default_run_dir() / FILE
    if file is None and not path.exists():
        if drive is not None:
            raise UserError(
                "--drive takes the place of a drive in a machine's cost model, and there is none:"
                " run `inflash doctor`, or give --machine FILE"
            )
        return None
    machine = load_machine(path)
    return machine if drive is None else with_drive(machine, drive)


def _draw(
    model: Described, forecaster: Forecaster, rows: list[Forecast], knee: Forecast | None,
    path: Path,
) -> None:  # fmt: skip
    if not any(row.speed for row in rows):
        raise UserError(f"{path} was not drawn: no speed is known without `inflash doctor`")
    from common.forecast.picture import draw_plan

    draw_plan(model.name, rows, knee, path)


def as_object(
    model: Described, behaviour: Behaviour, forecaster: Forecaster, found: Forecast,
    rows: list[Forecast], knee: Forecast | None, machine: Machine | None,
) -> dict[str, Any]:  # fmt: skip
    """All of it as JSON has it."""
    geometry = model.geometry
    return {
        "model": {
            "name": model.name, "kind": model.kind, "family": model.family,
            "layers": geometry.layers, "neurons": geometry.neurons, "hidden": geometry.hidden,
            "dtype": geometry.dtype, "checkpoint_bytes": model.checkpoint_bytes,
            "store_bytes": model.store_bytes, "resident_bytes": model.resident_bytes,
            "ffn_bytes": geometry.ffn_bytes, "notes": list(model.notes),
        },
        "behaviour": {
            "source": behaviour.source, "fitted": behaviour.fitted, "measured": behaviour.measured,
            "fired": _mean(behaviour.fired), "named": _mean(behaviour.named),
        },
        "machine": None if machine is None else {
            "host": machine.host, "made": machine.made, "drive": machine.drive.source,
        },
        "smallest_bytes": forecaster.smallest_bytes,
        "largest_bytes": forecaster.largest_bytes,
        "range_factor": forecaster.spread,
        "forecast": found.as_object(),
        "table": [row.as_object() for row in rows],
        "knee_bytes": None if knee is None else knee.memory_bytes,
    }  # fmt: skip


def show(
    model: Described, behaviour: Behaviour, forecaster: Forecaster, found: Forecast,
    rows: list[Forecast], knee: Forecast | None, machine: Machine | None,
) -> None:  # fmt: skip
    """Tables, then sentences."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room
        console.width = FILE_COLUMNS
    geometry = model.geometry
    console.print(
        f"{model.name} ({model.kind}): {model.family}, {geometry.layers} layers ×"
        f" {geometry.neurons:,} neurons, hidden {geometry.hidden:,}, {geometry.dtype}",
        style="bold", markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_verdict(model, forecaster, found), markup=False, soft_wrap=True)
    console.print()
    if found.speed is not None:
        console.print(_speeds(found.speed))
        console.print()
    console.print(_sizes(rows, found, knee))
    console.print()
    for sentence in _sentences(model, behaviour, forecaster, found, knee, machine):
        console.print(f"• {sentence}", markup=False, soft_wrap=True)


def _verdict(model: Described, forecaster: Forecaster, found: Forecast) -> str:
    if not found.fits or found.plan is None:
        return (
            f"Does not fit in {_bytes(found.memory_bytes)}: the smallest budget that works is"
            f" {_bytes(forecaster.smallest_bytes)}."
        )
    lines = found.plan.lines()
    weights = ("resident", "kv", "predictors", "cache")
    others = sum(size for name, size in lines.items() if name not in weights)
    return (
        f"Fits in {_bytes(found.memory_bytes)}: resident weights {_bytes(lines['resident'])},"
        f" keys and values {_bytes(lines['kv'])} ({found.plan.context:,} tokens), predictors"
        f" {_bytes(lines['predictors'])}, processes and their room {_bytes(others)}; the cache gets"
        f" {_bytes(lines['cache'])}, {found.cache_share:.0%} of the"
        f" {_bytes(model.geometry.ffn_bytes)} on flash."
    )


def _speeds(speed: Speed) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("expected", "from", "to"):
        table.add_column(heading, justify="right")
    rows = {
        "tokens/s, warm": speed.tokens_per_s,
        f"tokens/s, first {TOKENS_COLD} from an empty cache": speed.tokens_per_s_cold,
        "first token, warm, s": speed.first_token_s,
        "first token, empty cache, s": speed.first_token_s_cold,
    }
    for name, one in rows.items():
        table.add_row(name, *map(_number, (one.expected, one.low, one.high)))
    return table


def _sizes(rows: list[Forecast], asked: Forecast, knee: Forecast | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("memory", "cache", "of FFN", "window", "hits", "read a token", "tokens/s",
                    "from–to", "first token"):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        notes = [note for note, is_it in (
            ("asked for", row.memory_bytes == asked.memory_bytes),
            ("knee", knee is not None and row.memory_bytes == knee.memory_bytes),
        ) if is_it]  # fmt: skip
        style = "bold" if notes else None
        if row.plan is None:
            table.add_row(_bytes(row.memory_bytes), *["–"] * 8, "does not fit", style=style)
            continue
        told = [_bytes(row.memory_bytes), _bytes(row.plan.cache_bytes), f"{row.cache_share:.0%}"]
        table.add_row(*told, *_told(row.speed), ", ".join(notes), style=style)
    return table


def _told(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["–"] * 6
    span: Range = speed.tokens_per_s
    return [
        "all" if speed.window_tokens is None else f"{speed.window_tokens:,}",
        f"{speed.hit_rate:.0%}", _bytes(speed.bytes_per_token),
        _number(span.expected), f"{_number(span.low)}–{_number(span.high)}",
        f"{_number(speed.first_token_s.expected)} s",
    ]  # fmt: skip


def _sentences(
    model: Described, behaviour: Behaviour, forecaster: Forecaster, found: Forecast,
    knee: Forecast | None, machine: Machine | None,
) -> list[str]:  # fmt: skip
    said = []
    if found.speed is not None:
        token, total = found.speed.token, found.speed.token.total
        shares = ", ".join(f"{name} {getattr(token, name) / total:.0%}" for name in CAUSES)
        said.append(f"A token's {total:,.0f} ms: {shares}. A server starts in about"
                    f" {found.speed.start_s:.0f} s.")  # fmt: skip
    if knee is not None and knee.speed is not None:
        said.append(
            f"The knee is at {_bytes(knee.memory_bytes)}:"
            f" {_number(knee.speed.tokens_per_s.expected)} tokens/s; from there on more memory"
            f" gains less and less, and beyond {_bytes(forecaster.largest_bytes)} nothing."
        )
    elif machine is not None:
        said.append(
            f"More memory gains little here: from {_bytes(forecaster.smallest_bytes)} on, reads"
            " are not what a token waits for."
        )
    said.append(
        f"{_mean(behaviour.fired):.1%} of the neurons fire, {_mean(behaviour.named):.1%} are named"
        f" ({behaviour.source})."
    )
    said.append(_disk(model))
    said += [f"{note[0].upper()}{note[1:]}." for note in model.notes]
    if not behaviour.fitted:
        said.append(
            "It is foretold as it will be once `inflash fit` has made its predictors:"
            f" {_bytes(forecaster.predictors_bytes)} of them, by their usual ranks."
        )
    if machine is None:
        said.append(
            "No cost model of this machine: run `inflash doctor` once, and speeds are foretold."
        )
    else:
        said.append(
            f"Speeds are of {machine.host} as measured {machine.made}, drive:"
            f" {machine.drive.source}; a range is the expectation divided and multiplied by"
            f" {forecaster.spread:.1f} (docs/forecast.md)."
        )
    return said


def _disk(model: Described) -> str:
    if model.kind == "store":
        return f"The store is there: {_bytes(model.store_bytes)}."
    both = model.store_bytes + model.checkpoint_bytes
    download = "the download" if model.kind in ("Hub", "config.json") else "the checkpoint"
    return (
        f"Disk: a conversion writes {_bytes(model.store_bytes)} beside {download} of"
        f" {_bytes(model.checkpoint_bytes)}, {_bytes(both)} together; {download} can go afterwards."
    )


def _bytes(size: float) -> str:
    return decimal(int(size), precision=2)


def _mean(shares: tuple[float, ...]) -> float:
    return sum(shares) / len(shares)


def _number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main(prog_name="inflash plan")
