"""What logging and checksums cost, as ratios in one run: the figures of docs/measurements.md.

Two servers of the same store run side by side, one with the log at `info` (an event per layer), one
at `warning` (none); they answer in turn. A cache of the whole FFN leaves the least work to hide
behind. The checksum's cost is the reader's own count of nanoseconds and bytes.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

import click

from common.errors import UserError
from common.launch import Server
from inflash import Client
from inflash._errors import InflashError


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--rounds", default=15, show_default=True, help="Answers of each server.")
@click.option("--tokens", default=200, show_default=True, help="Tokens of each answer.")
def main(store: Path, rounds: int, tokens: int) -> None:
    """Measure on STORE what per-layer logging and checksums cost."""
    try:
        measure(store, rounds, tokens)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")


def measure(store: Path, rounds: int, tokens: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = {}
        for level in ("info", "warning"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="inflash-"))
            options = {"store": str(store.absolute()), "run_dir": folder, "log_level": level}
            stack.enter_context(Server(options | {"cache": "100%"}))
            clients[level] = stack.enter_context(Client(folder))
        pairs = []
        for number in range(rounds + 1):
            order = list(clients) if number % 2 else list(reversed(clients))
            times = {level: token_ms(clients[level], tokens) for level in order}
            if number:  # the first fills the caches
                pairs.append((times["info"], times["warning"]))
        report_logging(pairs)
        report_checksums(clients["info"])


def token_ms(client: Client, tokens: int) -> float:
    """Milliseconds a token, decode only."""
    answer = client.generate("def ", max_new_tokens=tokens, ignore_eos=True)
    for _ in answer:
        pass
    assert answer.stats is not None
    return 1000 / answer.stats.tokens_per_s


def report_logging(pairs: list[tuple[float, float]]) -> None:
    ratios = sorted(on / off for on, off in pairs)
    print(
        f"logging: {statistics.median(on for on, _ in pairs):.3f} ms a token with it,"
        f" {statistics.median(off for _, off in pairs):.3f} without;"
        f" median of {len(ratios)} paired ratios {statistics.median(ratios):.3f}"
        f" (quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f})"
    )


def report_checksums(client: Client) -> None:
    counters = client.status()["services"]["reader"]["counters"]
    verified, took_ns = counters["verified_bytes"], counters["verify_ns"]
    print(
        f"checksums: {took_ns / verified * 1e9 / 1e6:.0f} ms per GB, once per bundle"
        f" ({verified:,} bytes in {took_ns / 1e6:.1f} ms)"
    )


if __name__ == "__main__":
    main()
