"""inflash bench: inflash beside others on a checkpoint that it makes itself. Thin: common/bench/.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from common.bench.names import chosen
from common.bench.options import Options
from common.bench.picture import draw_report
from common.bench.report import verdicts
from common.bench.run import bench
from common.bench.studies import PREFILL_TOKENS
from common.bench.tables import tables
from common.config import parse_size
from common.errors import UserError
from common.outputs import check_output, check_picture, sentences
from common.planted.shapes import SHAPES

FILE_COLUMNS = 120

_ERR = Console(stderr=True, highlight=False)


class Progressing:
    """A conversion's `Report` on stderr: a bar for bytes, a line for each note."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.stop()
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(
            TextColumn("  "), *columns, console=_ERR, transient=True, disable=not _ERR.is_terminal
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total_bytes, completed=done_bytes)

    def advance(self, written_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, written_bytes)

    def note(self, sentence: str) -> None:
        self.stop()
        _ERR.print(sentence, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _size(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Bytes in "7GB"."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=option) from None


def _settings(_: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """A server's settings, from KEY=VALUE."""
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE, as cache=24%", param=option)
    return dict(text.split("=", 1) for text in texts)


def _counts(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """How many clients, from "1,2,4,8"."""
    words = [] if text is None else text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text!r}: write numbers of clients, as 1,2,4,8", param=option)
    return tuple(dict.fromkeys(map(int, words)))


_COUNT = click.IntRange(1)


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), help="[default: opt-6.7b]")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A config.json of an OPT or a Llama with relu, in place of --shape.",
)
@click.option(
    "--cap",
    callback=_size,
    metavar="SIZE",
    help="Memory of each contender, all its processes. [default: half the checkpoint, or the least"
    " that inflash runs in with a twentieth of the FFN cached]",
)
@click.option("--tokens", type=_COUNT, default=32, show_default=True, help="Timed in an answer.")
@click.option(
    "--rival-tokens",
    type=_COUNT,
    default=8,
    show_default=True,
    help="Timed of who reads the whole model for each of them.",
)
@click.option(
    "--prompt",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a prompt.",
)
@click.option(
    "--prompts", type=_COUNT, default=3, show_default=True, help="Different ones, in one server."
)
@click.option(
    "--rounds",
    type=_COUNT,
    default=3,
    show_default=True,
    help="All contenders take turns so often.",
)
@click.option(
    "--only",
    default="default",
    show_default=True,
    metavar="NAMES",
    help="Contenders and groups of them, of those above; inflash has to be among them.",
)
@click.option(
    "--set",
    "settings",
    callback=_settings,
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of inflash's server, as cache=24%; may be repeated.",
)
@click.option(
    "--prefill",
    is_flag=True,
    help=f"The time of a prompt of {PREFILL_TOKENS} tokens, of each, in a run of its own.",
)
@click.option(
    "--clients",
    callback=_counts,
    metavar="COUNTS",
    help="As 1,2,4,8: tokens/s of so many clients at once of one server, each of ours by itself.",
)
@click.option("--ablation", is_flag=True, help="Measure each step from the naive way to this one.")
@click.option(
    "--placed",
    type=click.Path(path_type=Path),
    metavar="STORE",
    help="For the ablation: the same model, by `inflash convert --placement`.",
)
@click.option("--growth", is_flag=True, help="Token time and bytes of OPT from 125M up to SHAPE.")
@click.option("--context-cost", is_flag=True, help="Decode at 16 and at 2,048 tokens of context.")
@click.option(
    "--everything-cached", is_flag=True, help="No cap, no reads: what the processes cost a layer."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report as one JSON object.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write it as a picture; .png, .svg or .pdf.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(".bench"),
    show_default=True,
    help="Folder for what is made: three times the model for the default contenders, five times for"
    " all of them.",
)
@click.option(
    "--keep/--remove",
    default=True,
    show_default=True,
    help="What was made: keep it for the next bench, or not.",
)
@click.option(
    "--rival-python",
    default=sys.executable,
    metavar="PATH",
    help="An interpreter with the rivals' packages. [default: this one]",
)
def main(
    shape: str | None, config: Path | None, settings: dict[str, str],
    only: str, json_file: Path | None, plot_file: Path | None, work: Path, keep: bool,
    rival_python: str, cap: int | None, **given: Any,
) -> None:  # fmt: skip
    """Measure inflash beside others, on a checkpoint that it makes.

    Makes a checkpoint of SHAPE whose behaviour is planted and checked against what was published
    for OPT 6.7B (how many neurons fire, are predicted, are new in a token), converts it, and runs
    each contender in a memory cgroup of the size --cap, by turns, from a cold page cache:

    \b
      inflash           a server with --memory at the cap; new prompts in a warm cache
      inflash_int8      the same with int8 bundles, attention and head
      inflash_int4      the same with int4, the head in int8
      accelerate        transformers with disk offload, the same checkpoint, the same cap
      llama_cpp_mmap    llama.cpp on an F16 GGUF of the same shape, mapped, the same cap
      llama_cpp_ram     the same, all of it in memory, no cap
      llama_cpp_q8_0    llama.cpp on the same shape in Q8_0, mapped, the same cap
      llama_cpp_q4_0    in Q4_0, the head in Q8_0, mapped, the same cap

    \b
      default           inflash, accelerate, llama_cpp_mmap, llama_cpp_ram
      packed            the two of ours and the two of llama.cpp with fewer bits
      all               all eight

    Beside them stand the floors, measured in the same run: what this drive and this memory would
    need for a token's bytes alone. The report ends with what could not be enforced or measured.
    To cap memory takes root, or a cgroup that this user may write.

    The rivals are optional; what is not installed is reported as absent. To have them:

    \b
      .venv/bin/pip install -e '.[bench]'

    \b
      inflash bench --cap 7GB --json bench.json --plot bench.png
      inflash bench --cap 7GB --only inflash,packed --prefill --clients 1,2,4,8
      inflash bench --shape opt-125m --set cache=24% --only inflash --ablation
    """
    if shape and config:
        raise click.UsageError("--shape and --config exclude each other")
    report = Progressing()
    # As Ctrl-C does: contenders and their cgroup are not to outlive us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if json_file:
            check_output(json_file)
        if plot_file:
            check_picture(plot_file)
        options = Options(
            shape=config or shape or "opt-6.7b", work=work, cap_bytes=cap, names=chosen(only),
            settings=settings, python=rival_python, remove=not keep, **given,
        )  # fmt: skip
        with sentences("the bench stopped"):
            found = bench(options, report)
            if json_file:
                json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if plot_file:
                draw_report(found, plot_file)
    except UserError as error:
        report.stop()
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        report.stop()
        _ERR.print(f"stopped; what was made is in {work}, and is used again", soft_wrap=True)
        sys.exit(130)
    show(found)


def show(found: dict[str, Any]) -> None:
    """Tables, then sentences, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room
        console.width = FILE_COLUMNS
    for table in tables(found):
        console.print(table)
        console.print()
    for sentence in verdicts(found):
        console.print(f"• {sentence}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(prog_name="inflash bench")
