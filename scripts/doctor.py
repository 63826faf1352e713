"""inflash doctor: what this machine can do, as a cost model that `inflash plan` foretells from.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as ElapsedColumn
from rich.table import Table

from common.errors import UserError
from common.forecast.advice import sentences, warnings
from common.forecast.machine import FILE, Drive, Machine
from common.forecast.probe import STAGES, probe
from common.outputs import check_output, check_picture
from common.outputs import sentences as saying
from common.system import DriveFacts, Limits, drive_facts, limits, swap_written_bytes
from inflash._rundir import default_run_dir

BAR = 32  # columns of the longest
FILE_COLUMNS = 120
SAID = {
    "drive": "reading the drive", "memory": "reading memory", "products": "multiplying",
    "predictor": "predicting", "processes": "serving a small model",
}  # fmt: skip
_ERR = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a visit finds."""

    machine: Machine
    facts: DriveFacts | None
    limits: Limits
    drive_read_bytes: int | None  # while this ran, by everyone
    drive_written_bytes: int | None
    swap_written_bytes: int | None
    file: Path

    def as_object(self) -> dict[str, Any]:
        said = self.facts, self.limits, self.swap_written_bytes
        return {
            "machine": self.machine.as_object(),
            "drive": None if self.facts is None else dataclasses.asdict(self.facts),
            "limits": dataclasses.asdict(self.limits),
            "while_running": {
                "drive_read_bytes": self.drive_read_bytes,
                "drive_written_bytes": self.drive_written_bytes,
                "swap_written_bytes": self.swap_written_bytes,
            },
            "sentences": sentences(self.machine, *said),
            "warnings": warnings(*said),
            "file": str(self.file),
        }


@click.command()
@click.argument("where", type=click.Path(path_type=Path), default=Path())
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the cost model goes. [default: machine.json in the run directory]",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the drive's curve; .png, .svg or .pdf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(where: Path, output: Path | None, plot: Path | None, as_json: bool) -> None:
    """Measure this machine with the drive of WHERE (a store, or a folder; the current one).

    Probes the drive as the server reads it (direct or through the page cache, sizes, depths), the
    memory's bandwidth, the products of each number format, and what the processes cost, with a
    small server of its own. Looks at the limits around it, and at the drive's temperature and wear
    where the system tells them. Writes the cost model that `inflash plan` foretells from, and says
    what was chosen and what you may change. Takes about a minute; measure while nothing else runs.

    In a folder that is no store it writes a file of 1 GB, reads it, and removes it.

    \b
      inflash doctor ~/stores
      inflash doctor ~/stores/opt-6.7b --plot drive.png
    """
    file = output or default_run_dir() / FILE
    # As Ctrl-C does: probes and their files are not to outlive us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with saying("the doctor stopped"):
            if output is None:
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_output(file)
            if plot:
                check_picture(plot)
            found = diagnose(where, file)
            _write(file, found.machine)
            if plot:
                from common.forecast.picture import draw_drive

                draw_drive(found.machine.drive, plot)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _ERR.print("stopped; nothing was written")
        sys.exit(130)
    if as_json:
        print(json.dumps(found.as_object()))
    else:
        show(found)


def diagnose(where: Path, file: Path) -> Diagnosis:
    """All probes. `UserError`."""
    if not where.exists():
        raise UserError(f"there is no {where}: name a store, or a folder of the drive to measure")
    swapped, before = swap_written_bytes(), drive_facts(where)
    with Progress(
        TextColumn("{task.description:24}"), BarColumn(), ElapsedColumn(), console=_ERR,
        transient=True, disable=not _ERR.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(STAGES))

        def tell(stage: str) -> None:
            bar.update(task, description=SAID[stage], completed=STAGES.index(stage))

        machine = probe(where, tell)
    after, swapped_after = drive_facts(where), swap_written_bytes()
    return Diagnosis(
        machine, after, limits(),
        _since(before.bytes_read, after.bytes_read) if before and after else None,
        _since(before.bytes_written, after.bytes_written) if before and after else None,
        _since(swapped, swapped_after), file,
    )  # fmt: skip


def _since(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _write(file: Path, machine: Machine) -> None:
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_text(json.dumps(machine.as_object(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def show(found: Diagnosis) -> None:
    """Tables, a chart, sentences."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room
        console.width = FILE_COLUMNS
    console.print(Group(_machine_table(found), "", _products_table(found.machine), ""))
    console.print(_chart(found.machine.drive))
    console.print()
    for sentence in sentences(found.machine, found.facts, found.limits, found.swap_written_bytes):
        style = "yellow" if sentence.startswith("Warning") else None
        console.print(f"• {sentence}", markup=False, soft_wrap=True, style=style)
    console.print(f"\nwrote {found.file}. Next: inflash plan MODEL --memory SIZE", soft_wrap=True,
                  markup=False)  # fmt: skip


def _machine_table(found: Diagnosis) -> Table:
    machine, facts, limits = found.machine, found.facts, found.limits
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    drive = machine.drive
    if facts is not None:
        table.add_row("drive", " · ".join([
            f"{facts.name} {facts.model or ''}".strip(),
            _told("{:.0f} °C", facts.temperature_c, "temperature"),
            _told("{} % worn", facts.wear_percent, "wear"),
        ]))  # fmt: skip
    alone = "" if drive.latency_us is None else f" · alone {drive.latency_us:,.0f} µs"
    table.add_row("a read", f"{drive.read_us:.1f} µs + {drive.byte_ns * 1.024:.2f} µs a KiB{alone}")
    table.add_row("while this ran", f"{_size(found.drive_read_bytes)} read,"
                  f" {_size(found.drive_written_bytes)} written,"
                  f" {_size(found.swap_written_bytes)} to swap")  # fmt: skip
    speed = f"{decimal(int(machine.memory_bytes_per_s))}/s ({machine.memory_way})"
    table.add_row("memory", f"{decimal(limits.memory_bytes)} · {speed}")
    table.add_row("processor", f"{machine.processor} · {machine.cores} cores")
    table.add_row("a layer's processes", f"{machine.layer_ms:.2f} ms a token")
    table.add_row("a server's start", f"{machine.start_s:.1f} s")
    group = "a cgroup limits memory" if limits.memory_limited else "no cgroup limit"
    table.add_row("limits", " · ".join([
        f"/dev/shm {_size(limits.shm_free_bytes)} free of {_size(limits.shm_bytes)}",
        f"memlock {_limit(limits.memlock_bytes, True)}",
        f"open files {_limit(limits.open_files)}",
        f"asynchronous reads {_limit(limits.aio_events_max)}",
        f"swap {decimal(limits.swap_bytes)}", group,
    ]))  # fmt: skip
    return table


def _products_table(machine: Machine) -> Table:
    few, many = machine.block_rows
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold",
                  title=f"products, GB/s, {machine.threads} threads")  # fmt: skip
    table.add_column("number format")
    headings = ("resident", "named rows", "firing rows", "keys, values",
                f"prompt of {few}", f"of {many}")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for dtype, speeds in machine.decode.items():
        blocks = machine.block[dtype]["resident"]
        values = [speeds[name] / 1e9 for name in ("resident", "named", "fired", "context")]
        table.add_row(dtype, *[f"{value:.1f}" for value in values],
                      *[f"{1e-9 / seconds:.2f}" for seconds in blocks])  # fmt: skip
    table.add_row("int8 (predictor)", f"{machine.predictor_bytes_per_s / 1e9:.1f}")
    return table


def _chart(drive: Drive) -> Table:
    """A bar for each size, at the depth that a server keeps; beside it what the cost model says."""
    depths = sorted({int(point["depth"]) for point in drive.points})
    title = f"the drive, GB/s by the size of a read, {depths[-1]} in flight"
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold",
                  title=title)  # fmt: skip
    table.add_column("read", justify="right")
    table.add_column("")
    for heading in (f"{depths[-1]}", *[f"{depth} in flight" for depth in depths[-2::-1]],
                    "cost model"):  # fmt: skip
        table.add_column(heading, justify="right")
    speeds = {(int(p["read_bytes"]), int(p["depth"])): p["bytes_per_s"] for p in drive.points}
    top = max(speeds.values())
    for size in sorted({size for size, _ in speeds}):
        own = [speeds[size, depth] for depth in depths[::-1]]
        model = size / drive.seconds(1, size)
        bar = "█" * max(1, round(BAR * own[0] / top))
        table.add_row(f"{size // 1024:,} KiB", bar, *[f"{one / 1e9:.2f}" for one in (*own, model)])
    return table


def _told(form: str, value: float | None, what: str) -> str:
    return f"{what} not told" if value is None else form.format(value)


def _size(value: int | None) -> str:
    return "an unknown number of bytes" if value is None else decimal(value)


def _limit(value: int | None, size: bool = False) -> str:
    if value is None:
        return "unlimited"
    return decimal(value) if size else f"{value:,}"


if __name__ == "__main__":
    main(prog_name="inflash doctor")
