"""What `inflash plan` foretells beside what a server does: `python -m scripts.forecasts STORE
--memory SIZE ...`, on this machine, after `inflash doctor`.

For each size a server is started with that --memory and asked several times; tokens are given, of
--text or drawn, so that every run has the same. The first answer is cold, the others are warm.

Exit status: 0 every speed lay inside its range, 1 refused or failed, 3 one did not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from common.config import parse_size
from common.errors import UserError
from common.forecast.behaviour import behaviour_of
from common.forecast.forecast import Forecaster, Range, Speed
from common.forecast.machine import FILE, load_machine
from common.forecast.source import describe
from common.launch import Server
from common.store.store import Store
from inflash import Client, Stats
from inflash._errors import InflashError
from inflash._rundir import default_run_dir

SEED = 1
CLIENT_S = 600.0
OUTSIDE = 3

Question = tuple[list[int], list[int]]
"""A prompt and the answer's tokens, which are given."""

_ERR = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Compared:
    """One figure: foretold, and measured."""

    what: str
    memory_bytes: int
    foretold: Range
    measured: float

    @property
    def inside(self) -> bool:
        return self.foretold.low <= self.measured <= self.foretold.high


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--memory", "sizes", multiple=True, required=True, help="May be repeated.")
@click.option("--text", type=click.Path(path_type=Path), help="Tokens of it, not drawn ones.")
@click.option("--machine", type=click.Path(path_type=Path), help="As `inflash plan` has it.")
@click.option("--prompt", default=32, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=33, show_default=True, type=click.IntRange(3), help="An answer.")
@click.option("--answers", default=3, show_default=True, type=click.IntRange(2))
@click.option("--context", default=512, show_default=True, type=click.IntRange(8))
@click.option("--json", "as_json", is_flag=True)
def main(
    store: Path, sizes: Sequence[str], text: Path | None, machine: Path | None, prompt: int,
    tokens: int, answers: int, context: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare forecasts with servers."""
    try:
        budgets = [parse_size(size) for size in sizes]
        described = describe(str(store))
        if described.store is None:
            raise UserError(f"{store} is no store")
        cost = load_machine(machine or default_run_dir() / FILE)
        forecaster = Forecaster(described, behaviour_of(described), cost, context, prompt)
        questions = make_questions(described.store, text, prompt, tokens, answers)
        found = []
        for budget in budgets:
            speed = forecaster.at(budget).speed
            if speed is None:
                raise UserError(
                    f"{decimal(budget)} are too few: {forecaster.smallest_bytes:,} work"
                )
            found += compare(speed, budget, serve(described.store, budget, context, questions))
            _ERR.print(f"{decimal(budget)} done")
    except (UserError, InflashError, ValueError) as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print(json.dumps([asdict(one) | {"inside": one.inside} for one in found]))
    else:
        show(found)
    sys.exit(0 if all(one.inside for one in found) else OUTSIDE)


def make_questions(
    store: Store, text: Path | None, prompt: int, tokens: int, count: int
) -> list[Question]:
    """Prompts and answers, of a text's windows or drawn."""
    length = prompt + tokens
    rows: npt.NDArray[np.integer[Any]]
    if text is not None:
        from common.learn.windows import windows_of

        rows = windows_of(store, [text], count * length, length).ids[:count]
    else:
        config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
        rows = np.random.default_rng(SEED).integers(0, config["vocab_size"], (count, length))
    return [(row[:prompt].tolist(), row[prompt:].tolist()) for row in rows]


def serve(store: Store, memory: int, context: int, questions: Sequence[Question]) -> list[Stats]:
    """The figures of each answer of a server with such a budget."""
    found = []
    with tempfile.TemporaryDirectory(prefix="inflash-") as folder:
        settings = {"store": str(store.path.absolute()), "run_dir": folder, "memory": f"{memory}",
                    "context": f"{context}", "reuse": "off"}  # fmt: skip
        with (
            Server(settings, quiet=True) as server,
            Client(server.run_dir, timeout=CLIENT_S) as client,
        ):
            for prompt, answer in questions:
                generation = client.generate(
                    prompt, max_new_tokens=len(answer), forced=answer, ignore_eos=True
                )
                for _ in generation:
                    pass
                if generation.stats is None:
                    raise UserError(f"no figures: the answer ended with {generation.finish_reason}")
                found.append(generation.stats)
    return found


def compare(speed: Speed, memory: int, stats: Sequence[Stats]) -> list[Compared]:
    """The forecast's figures beside those of a cold answer and of warm ones."""
    cold, *warm = stats
    tokens = sum(one.new_tokens - 1 for one in warm)
    measured = {
        "tokens/s, warm": (speed.tokens_per_s, tokens / sum(one.decode_s for one in warm)),
        "tokens/s, cold": (speed.tokens_per_s_cold, cold.tokens_per_s),
        "first token, warm, s": (
            speed.first_token_s, float(np.median([one.time_to_first_token_s for one in warm]))
        ),
        "first token, cold, s": (speed.first_token_s_cold, cold.time_to_first_token_s),
    }  # fmt: skip
    return [Compared(what, memory, *pair) for what, pair in measured.items()]


def show(found: Sequence[Compared]) -> None:
    """A row for each figure."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("memory", "", "expected", "from", "to", "measured", ""):
        table.add_column(heading, justify="right")
    for one in found:
        span = one.foretold
        values = [f"{value:.2f}" for value in (span.expected, span.low, span.high, one.measured)]
        table.add_row(decimal(one.memory_bytes, precision=2), one.what, *values,
                      "inside" if one.inside else "OUTSIDE")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main(prog_name="python -m scripts.forecasts")
