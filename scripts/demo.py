"""`./scripts/demo`: the shipped model, from checkpoint to proven answers, on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.launch import CHECKOUT, Server
from common.learn.fitted import FOLDER
from common.lowrank import FILES, REPORT
from common.store.store import Store
from inflash import Client, Stats
from inflash._errors import InflashError
from scripts.compare import prove, verdict
from scripts.demo_corpus import write_texts

MODEL = CHECKOUT / "models" / "demo"
WORK = CHECKOUT / ".demo"
STORE = WORK / "store"
FITTED = WORK / "fitted"  # what an earlier demo fitted, while the store is made anew
CACHE = "25%"
# A narrow model (hidden 256) needs ranks that are a large part of its width: --size allows them.
FIT = ("--tokens", "40000", "--passes", "1.5", "--size", "110%")
PROMPTS = (
    "def ",
    "import os\nimport sys\n\n\nclass ",
    'def read_lines(path):\n    """Return the lines of a file."""\n',
)
NEW_TOKENS = 96


def main() -> None:
    console = Console(highlight=False)
    try:
        convert(console)
        fit(console)
        stats = generate(console)
        console.print(figures(stats, Store.open(STORE)))
        console.print(predicted(stats))
        options = {"cache": CACHE, "predictor": "exact"}
        command = f"inflash compare {name(STORE)} {name(MODEL)} --cache {CACHE}"
        console.print(f"\n[dim]$ {command}[/]")
        proofs = prove(STORE, MODEL, PROMPTS, 64, options)
        console.print(verdict(proofs))
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if not all(proof.equal for proof in proofs):
        sys.exit(1)


def name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def convert(console: Console) -> None:
    """Makes the store, each time: the model may have changed since an earlier demo.

    What was fitted stays: `inflash fit` knows whether it is of this store, and else fits anew.
    """
    FITTED.mkdir(parents=True, exist_ok=True)
    _move_fitted(STORE, FITTED)
    shutil.rmtree(STORE, ignore_errors=True)
    run(console, "convert", name(MODEL), name(STORE))
    _move_fitted(FITTED, STORE)
    FITTED.rmdir()


def _move_fitted(source: Path, target: Path) -> None:
    for file in (*FILES, FOLDER):
        if (source / file).exists():
            (source / file).rename(target / file)


def fit(console: Console) -> None:
    """Fits predictors on text like that which the model was trained on: installed Python source."""
    text = WORK / "train.txt"
    if not text.exists():
        write_texts(WORK)
    run(console, "fit", name(STORE), "--text", name(text), *FIT)


def run(console: Console, command: str, *arguments: str) -> None:
    """One of inflash's commands, as a user would type it; ends the demo if it fails."""
    console.print(f"\n[dim]$ inflash {command} {' '.join(arguments)}[/]")
    process = [sys.executable, "-m", f"scripts.{command}", *arguments]
    if status := subprocess.run(process, cwd=CHECKOUT, check=False).returncode:
        sys.exit(status)


def generate(console: Console) -> list[Stats]:
    """Serves with a small cache and the fitted predictors and streams an answer to each prompt."""
    console.print(f"\n[dim]$ inflash serve {name(STORE)} --cache {CACHE}[/]")
    stats = []
    with tempfile.TemporaryDirectory(prefix="inflash-") as run_dir:
        options = {"store": str(STORE), "cache": CACHE, "run_dir": run_dir}
        with Server(options), Client(run_dir) as client:
            for prompt in PROMPTS:
                console.rule(style="dim")
                console.print(f"[bold]{prompt}[/]", end="", markup=True)
                answer = client.generate(
                    prompt, max_new_tokens=NEW_TOKENS, temperature=0.6, top_k=40, seed=7
                )
                for token in answer:
                    console.print(token.text, end="", markup=False)
                console.print()
                assert answer.stats is not None
                stats.append(answer.stats)
    console.rule(style="dim")
    return stats


def figures(stats: list[Stats], store: Store) -> Table:
    """A row per prompt. Tokens after the first only: the first one's prompt streams all layers."""
    ffn_bytes = store.geometry.ffn_bytes
    title = f"cache: {CACHE} of {ffn_bytes / 1e6:.1f} MB FFN weights"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("prompt", no_wrap=True)
    for heading in ("tokens/s", "hits", "late", "read a token", "of FFN", "hidden"):
        table.add_column(heading, justify="right", no_wrap=True)
    for prompt, s in zip(PROMPTS, stats, strict=True):
        read = s.decode_bytes_per_token
        table.add_row(
            repr(prompt)[:16] + "…" if len(repr(prompt)) > 16 else repr(prompt),
            f"{s.tokens_per_s:.1f}",
            f"{s.decode_hit_rate:.1%}",
            f"{s.decode_late_share:.1%}",
            f"{read / 1e6:.2f} MB",
            f"{read / ffn_bytes:.1%}",
            f"{s.decode_hidden_share:.0%}",
        )
    return table


def predicted(stats: list[Stats]) -> str:
    """What prediction came to: the fit's recall on held-out text, and what these answers saw."""
    totals = json.loads((STORE / REPORT).read_text(encoding="utf-8"))["totals"]
    ahead, same = totals["ahead"], totals["same"]
    late = sum(s.decode_late_fired for s in stats) / max(sum(s.decode_fired for s in stats), 1)
    return (
        f"prediction on held-out text: {ahead['recall']:.1%} of what fires found one layer ahead"
        f" ({ahead['named_per_active']:.2f} named for each), {same['recall']:.1%} in the layer"
        f" itself ({same['named_per_active']:.2f}); {late:.1%} of the neurons that fired were late"
    )


if __name__ == "__main__":
    main()
