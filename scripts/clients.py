"""What several clients get at once: `python -m scripts.clients STORE --clients 1,2,4,8`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from common.bench.clients import Together, draw, measure_clients
from common.bench.inflash import vocabulary
from common.errors import UserError
from common.launch import Server
from common.limits import QUEUE_MAX, RUNNING_MAX
from common.store.store import Store
from inflash._errors import InflashError
from scripts.options import server_options


class Counts(click.ParamType):  # type: ignore[type-arg]  # in older clicks it is not generic
    """Numbers of clients, with commas between."""

    name = "counts"

    def convert(self, value: object, param: object, ctx: object) -> list[int]:
        most = RUNNING_MAX + QUEUE_MAX
        parts = str(value).split(",")
        if not all(p.strip().isdecimal() and 1 <= int(p) <= most for p in parts):
            self.fail(f"{value!r}: numbers of clients, 1 to {most} each, as 1,2,4,8")
        return [int(p) for p in parts]


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@server_options
@click.option("--clients", default="1,2,4,8", type=Counts(), show_default=True,
              help="How many at once, one measurement after the other.")  # fmt: skip
@click.option("--tokens", default=128, type=click.IntRange(min=2), show_default=True,
              help="Of an answer.")  # fmt: skip
@click.option("--minutes", default=0.0, type=click.FloatRange(min=0),
              help="Ask again for so long, each number of clients. [default: once]")  # fmt: skip
@click.option("--drawn", is_flag=True, help="Prompts and answers are drawn ids, not text.")
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def main(
    store: Path, clients: list[int], tokens: int, minutes: float, drawn: bool, as_json: bool,
    **options: str | None,
) -> None:  # fmt: skip
    """Serve STORE to several clients at once: tokens/s of all together, the slowest one's share,
    memory of all processes at start and end, tokens lost or doubled.

    Each client has a prompt of its own and asks greedily; answers are compared with those that the
    prompts get alone. With the exact predictor none should differ. The exit status is 1 if a token
    was lost or doubled.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        with tempfile.TemporaryDirectory(prefix="inflash-") as run_dir:
            given |= {"store": str(store.absolute()), "run_dir": run_dir}
            asked: dict[str, Any] = {}
            if drawn:
                ids = vocabulary(Store.open(store))
                asked["prompts"], asked["given"] = draw(ids, max(clients), tokens)
            with Server(given):
                rows = measure_clients(Path(run_dir), clients, tokens, 60 * minutes, **asked)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print(json.dumps({"tokens": tokens, "clients": [row.plain() for row in rows]}))
    else:
        Console().print(table(rows))
    sys.exit(any(row.lost or row.doubled for row in rows))


def table(rows: list[Together]) -> Table:
    """A row for each number of clients; `times` is of the first row's tokens/s, `first token` the
    longest wait for one."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("clients", "tokens/s", "times", "slowest\nshare", "first\ntoken", "memory\nMB",
                 "answers", "lost,\ndoubled", "differ"):  # fmt: skip
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        memory = "→".join(
            "–" if size is None else f"{size / 1e6:,.0f}"
            for size in (row.memory_start_bytes, row.memory_end_bytes)
        )
        times = row.tokens_per_s / rows[0].tokens_per_s
        made.add_row(
            str(row.n), f"{row.tokens_per_s:.1f}", f"{times:.2f}", f"{row.slowest_share:.0%}",
            f"{row.first_token_s_max:.2f} s", memory, f"{row.answers:,}",
            f"{row.lost}, {row.doubled}", str(row.different),
        )  # fmt: skip
    return made


if __name__ == "__main__":
    main(prog_name="python -m scripts.clients")
