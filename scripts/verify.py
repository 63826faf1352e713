"""inflash verify STORE: re-reads a store against its checksums. Thin: common/store/verify.

Exit status: 0 every byte is right, 1 something is bad or is no store, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from common.errors import UserError
from common.lowrank import FILES, PREDICTORS, has_predictors, predictor_problem
from common.store.store import Store
from common.store.verify import Findings, Problem, store_bytes, verify_store

_ERR = Console(stderr=True, highlight=False)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="What was found, as JSON on stdout.")
def main(store: Path, as_json: bool) -> None:
    """Re-read the whole STORE against its checksums and digests, and name what is bad."""
    started = time.monotonic()
    try:
        findings = _verify(store)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _ERR.print("stopped before the end: nothing is proved")
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(findings)))
    else:
        _show(store, findings, time.monotonic() - started)
    sys.exit(1 if findings.problems else 0)


def _verify(store: Path) -> Findings:
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_ERR) as progress:
        task = progress.add_task("", total=store_bytes(store))
        findings = verify_store(store, lambda count: progress.advance(task, count))
    surplus = tuple(name for name in findings.surplus if name not in FILES)
    problems = findings.problems
    # Of a store whose manifest is bad nothing can be said about its predictors.
    opened = None if problems else Store.open(store)
    if opened and has_predictors(opened) and (problem := predictor_problem(opened)):
        problems = (Problem(f"{problem}; run inflash fit {store} again", PREDICTORS),)
    return dataclasses.replace(findings, problems=problems, surplus=surplus)


def _show(store: Path, findings: Findings, seconds: float) -> None:
    for problem in findings.problems:
        click.echo(problem.text)
    for name in findings.surplus:
        click.echo(f"{name} is no part of the store")
    rate = findings.bytes_read / max(seconds, 1e-9) / 1e9
    read = f"{decimal(findings.bytes_read)} read in {seconds:.1f} s, {rate:.2f} GB/s"
    bad = len(findings.problems)
    verdict = f"{bad} {'problem' if bad == 1 else 'problems'}" if bad else "every byte is right"
    click.echo(f"{store}: {verdict}; {read}.")


if __name__ == "__main__":
    main(prog_name="inflash verify")
