"""`./scripts/demo`: the shipped model, from checkpoint to proven answers, on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.launch import CHECKOUT, Server
from common.store.store import Store
from inflash import Client, Stats
from inflash._errors import InflashError
from scripts.compare import prove, verdict

MODEL = CHECKOUT / "models" / "demo"
STORE = CHECKOUT / ".demo" / "store"
CACHE = "25%"
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
        stats = generate(console)
        console.print(figures(stats, Store.open(STORE)))
        options = {"cache": CACHE, "predictor": "exact"}
        console.print(f"\n[dim]$ inflash compare {name(STORE)} {name(MODEL)} --cache {CACHE}[/]")
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
    """Converts anew each time: it is the first half of the main job."""
    shutil.rmtree(STORE, ignore_errors=True)
    STORE.parent.mkdir(exist_ok=True)
    console.print(f"[dim]$ inflash convert {name(MODEL)} {name(STORE)}[/]")
    command = [sys.executable, "-m", "scripts.convert", name(MODEL), name(STORE)]
    if subprocess.run(command, cwd=CHECKOUT, check=False).returncode:
        sys.exit(1)


def generate(console: Console) -> list[Stats]:
    """Serves with a small cache and streams an answer to each prompt."""
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
    table = Table(title=f"cache: {CACHE} of {store.geometry.ffn_bytes / 1e6:.1f} MB FFN weights")
    table.add_column("prompt", no_wrap=True)
    for heading in ("tokens/s", "hit rate", "read per token", "of the FFN", "stall"):
        table.add_column(heading, justify="right")
    for prompt, s in zip(PROMPTS, stats, strict=True):
        read = s.decode_bytes_per_token
        table.add_row(
            repr(prompt)[:20] + "…" if len(repr(prompt)) > 20 else repr(prompt),
            f"{s.tokens_per_s:.1f}",
            f"{s.decode_hit_rate:.1%}",
            f"{read / 1e3:,.0f} kB",
            f"{read / store.geometry.ffn_bytes:.1%}",
            f"{s.decode_stall_share:.0%}",
        )
    return table


if __name__ == "__main__":
    main()
