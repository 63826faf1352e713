"""What tracing and checksums cost, as ratios in one run: the figures of docs/measurements.md.

One server answers by turns, traced and not: the same processes, the same cache. A cache of the
whole FFN leaves the least work to hide behind. The checksum's cost is the reader's own count of
nanoseconds and bytes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from common.errors import UserError
from common.launch import Server
from inflash import Client
from inflash._errors import InflashError


@dataclass(frozen=True)
class Tracing:
    """Milliseconds a token with and without tracing: medians, and the paired ratios' quartiles."""

    on_ms: float
    off_ms: float
    ratio: float
    quartiles: tuple[float, float]
    pairs: int


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--rounds", default=15, show_default=True, help="Answers of each kind.")
@click.option("--tokens", default=200, show_default=True, help="Tokens of each answer.")
@click.option("--cache", default="100%", show_default=True, help="As of `inflash serve`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def main(store: Path, rounds: int, tokens: int, cache: str, as_json: bool) -> None:
    """Measure on STORE what tracing and checksums cost."""
    try:
        measure(store, rounds, tokens, cache, as_json)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")


def measure(store: Path, rounds: int, tokens: int, cache: str, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="inflash-") as folder:
        options = {"store": str(store.absolute()), "run_dir": folder, "cache": cache}
        with Server(options, quiet=True), Client(folder) as client:
            pairs = []
            for number in range(rounds + 1):
                order = (True, False) if number % 2 else (False, True)
                times = {trace: token_ms(client, tokens, trace) for trace in order}
                if number:  # the first fills the cache
                    pairs.append((times[True], times[False]))
            found = tracing(pairs)
            counters = client.status()["services"]["reader"]["counters"]
    verified, took_ns = counters["verified_bytes"], counters["verify_ns"]
    if as_json:
        ns_per_byte = took_ns / verified if verified else None
        print(json.dumps({"tracing": asdict(found), "checksum_ns_per_byte": ns_per_byte}))
        return
    print(
        f"tracing: {found.on_ms:.3f} ms a token with it, {found.off_ms:.3f} without;"
        f" median of {found.pairs} paired ratios {found.ratio:.3f}"
        f" (quartiles {found.quartiles[0]:.3f} to {found.quartiles[1]:.3f})"
    )
    if verified:
        print(
            f"checksums: {took_ns / verified * 1e3:.0f} ms per GB, {took_ns / 1e6:.1f} ms for"
            f" {verified / 1e6:.1f} MB, once in a reader's life"
        )


def token_ms(client: Client, tokens: int, trace: bool) -> float:
    """Milliseconds a token, decode only."""
    answer = client.generate("def ", max_new_tokens=tokens, ignore_eos=True, trace=trace)
    for _ in answer:
        pass
    assert answer.stats is not None
    return 1000 / answer.stats.tokens_per_s


def tracing(pairs: list[tuple[float, float]]) -> Tracing:
    """What the pairs, (traced, not traced) in milliseconds, come to."""
    ratios = sorted(on / off for on, off in pairs)
    return Tracing(
        statistics.median(on for on, _ in pairs),
        statistics.median(off for _, off in pairs),
        statistics.median(ratios),
        (ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]),
        len(ratios),
    )


if __name__ == "__main__":
    main(prog_name="python -m scripts.overheads")
