"""`inflash trace [RUN]`: where the time of a run's tokens went, and what bounds it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live

from common.errors import UserError
from common.messages import SERVICES
from common.outputs import check_output, sentences
from common.spans import Span, SpanReader
from common.trace import tables
from common.trace.page import page_of
from common.trace.perfetto import trace_of
from common.trace.run import Run, load_run, read_facts, requests_of
from common.trace.summary import figures
from common.trace.tokens import tokens_of
from common.trace.verdict import judge
from inflash._errors import InflashError
from inflash._rundir import default_run_dir

FOLLOW_S = 1.0  # between two looks
FOLLOW_TOKENS = 128  # that a look is about: the latest
FOLLOW_SPANS_MAX = 100_000  # of each service, kept for it


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--request", metavar="N", help="Only this one: its number in the run, or `last`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--perfetto",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a trace for ui.perfetto.dev or chrome://tracing.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one page with timelines and charts; it needs no network.",
)
@click.option("--follow", is_flag=True, help="Show the latest tokens, live, until Ctrl-C.")
def main(
    run: Path | None,
    request: str | None,
    as_json: bool,
    perfetto: Path | None,
    html: Path | None,
    follow: bool,
) -> None:
    """Say where the time of RUN's tokens went, per layer and per token, and what bounds it.

    RUN is a server's run directory; by default that of `inflash serve`. The server may run or have
    ended. Times are those of the tokens after each answer's first.
    """
    run_dir = default_run_dir() if run is None else run.absolute()
    if follow and (request or as_json or perfetto or html):
        raise click.UsageError("--follow goes with no other option")
    try:
        if follow:
            show_live(run_dir)
        else:
            report(run_dir, request, as_json, perfetto, html)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def report(
    run_dir: Path, request: str | None, as_json: bool, perfetto: Path | None, html: Path | None
) -> None:
    """Prints the run, or writes what was asked for."""
    for path in filter(None, (perfetto, html)):
        check_output(path)
    with sentences(f"the run in {run_dir} cannot be read"):
        run = load_run(run_dir)
    if request is not None:
        run = run.only(request)
    found, verdict = figures(run), judge(run)
    if perfetto is not None:
        write(perfetto, json.dumps(trace_of(run), separators=(",", ":")))
    if html is not None:
        write(html, page_of(run, found, verdict))
    if as_json:
        print(json.dumps(found | {"verdict": verdict.plain()}))
        return
    console = Console(highlight=False)
    console.print(tables.whole(found, verdict))
    if perfetto is not None:
        console.print(f"wrote {perfetto}: open it in https://ui.perfetto.dev", soft_wrap=True)
    if html is not None:
        console.print(f"wrote {html}: open it in a browser", soft_wrap=True)


def write(path: Path, text: str) -> None:
    with sentences(f"{path} was not written"):
        path.write_text(text, encoding="utf-8")


class Follower:
    """The latest of a run, as it is written."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._readers = {service: SpanReader(run_dir, service) for service in SERVICES}
        self._spans: dict[str, deque[Span]] = {
            service: deque(maxlen=FOLLOW_SPANS_MAX) for service in SERVICES
        }

    def look(self) -> Run | None:
        """The run's latest FOLLOW_TOKENS tokens; None if there is none."""
        for service, reader in self._readers.items():
            self._spans[service].extend(reader.read())
        tokens = tokens_of(self._spans["compute"])[-FOLLOW_TOKENS:]
        if not tokens:
            return None
        since_ns = tokens[0].start_ns
        spans = {
            service: [span for span in found if span.end_ns >= since_ns or span.name == "queue"]
            for service, found in self._spans.items()
        }
        requests = requests_of(spans["gateway"], tokens)
        return Run(self._run_dir, read_facts(self._run_dir), spans, tokens, requests)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


def show_live(run_dir: Path) -> None:
    """Shows the latest tokens of a run until Ctrl-C."""
    if not (run_dir / "log").is_dir():
        raise UserError(f"{run_dir} is no run directory: there is no folder `log` in it")
    console = Console(highlight=False)
    follower = Follower(run_dir)
    try:
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(console=console, auto_refresh=False, vertical_overflow="crop") as live,
        ):
            while True:
                live.update(Group(*pieces(follower.look(), console.width)), refresh=True)
                time.sleep(FOLLOW_S)
    finally:
        follower.close()


def pieces(run: Run | None, width: int) -> Iterator[RenderableType]:
    """What is shown of a look."""
    if run is None:
        yield "no token yet: ask the server for something (inflash generate)"
        return
    yield from tables.live(figures(run), judge(run), width - 12)


if __name__ == "__main__":
    main(prog_name="inflash trace")
