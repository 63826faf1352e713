"""How long a prompt takes beside what this machine allows: `python -m scripts.prefill STORE`.

A server is asked for one token after --tokens of prompt, some times, each with another prompt. In
the same run, before and after, programs of their own measure what the time cannot fall below, of
which the larger counts; the better of what they find:

    read_s      bytes of the FFN, once a block of tokens ÷ bytes that the drive gives in a second
    multiply_s  operations of all products with weights ÷ those of one large float32 product, a
                second, by torch with all threads
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from common.bench.floors import drive_bytes_per_s
from common.errors import UserError
from common.forecast.shapes import multiplied_bytes
from common.launch import Server
from common.limits import READ_BYTES_MAX
from common.plan import make_plan
from common.probes import measure_drive, measure_products
from common.store.store import Store
from common.store.tensors import read_header
from inflash import Client
from inflash._errors import InflashError
from scripts.options import server_options

SEED = 1
CLIENT_S = 600.0


@dataclass(frozen=True)
class Floors:
    """What a prompt of so many tokens takes at least, seconds, and of what."""

    ffn_bytes: int
    drive_bytes_per_s: float
    operations: float
    operations_per_s: float

    @property
    def read_s(self) -> float:
        return self.ffn_bytes / self.drive_bytes_per_s

    @property
    def multiply_s(self) -> float:
        return self.operations / self.operations_per_s

    @property
    def larger_s(self) -> float:
        return max(self.read_s, self.multiply_s)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--tokens", default=512, show_default=True, help="Of a prompt.")
@click.option("--prompts", default=3, show_default=True, help="How many, each another.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@server_options
def main(store: Path, tokens: int, prompts: int, as_json: bool, **options: str | None) -> None:
    """Measure prompts of STORE on this machine, and the floors of their time."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        opened = Store.open(store)
        settings = {"store": str(store.absolute()), "context": f"{tokens + 1}"} | given
        passes = math.ceil(tokens / make_plan(Server(settings).settings, opened).block)
        before = measure_floors(opened, tokens, passes)
        seconds = ask(tokens, prompts, settings)
        after = measure_floors(opened, tokens, passes)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    floors = Floors(*map(max, dataclasses.astuple(before), dataclasses.astuple(after)))
    median = statistics.median(seconds)
    found: dict[str, Any] = dataclasses.asdict(floors) | {
        "tokens": tokens,
        "read_s": floors.read_s,
        "multiply_s": floors.multiply_s,
        "prompts_s": seconds,
        "ratio": median / floors.larger_s,
    }
    if as_json:
        print(json.dumps(found))
        return
    print(f"reads     {floors.read_s:8.2f} s  {floors.ffn_bytes / 1e9:.2f} GB at"
          f" {floors.drive_bytes_per_s / 1e9:.2f} GB/s")  # fmt: skip
    print(f"products  {floors.multiply_s:8.2f} s  {floors.operations / 1e12:.3f} T at"
          f" {floors.operations_per_s / 1e9:.1f} G/s")  # fmt: skip
    each = ", ".join(f"{value:.2f}" for value in seconds)
    print(f"prompt    {median:8.2f} s  {found['ratio']:.2f} × the larger (each: {each})")


def measure_floors(store: Store, tokens: int, passes: int) -> Floors:
    """The floors of a prompt on this machine, which goes through the model in so many blocks."""
    geometry = store.geometry
    bundles = max(min(READ_BYTES_MAX // geometry.stride_bytes, geometry.neurons), 1)
    drive = measure_drive(store.path, "--bundles", f"{bundles}")
    products = measure_products("--gemm")
    sizes = {
        name: tensor.nbytes
        for path in store.resident_paths()
        for name, tensor in read_header(path).items()
    }
    head = max(sizes.values())  # the embedding's, or the head's: of a prompt one row is multiplied
    weights = (multiplied_bytes(sizes) - head) // geometry.item_bytes
    weights += geometry.layers * geometry.neurons * len(geometry.parts) * geometry.hidden
    return Floors(
        ffn_bytes=passes * geometry.ffn_bytes,
        drive_bytes_per_s=drive_bytes_per_s(drive["points"], READ_BYTES_MAX),
        operations=2.0 * weights * tokens,
        operations_per_s=products["gemm"],
    )


def ask(tokens: int, prompts: int, settings: dict[str, str]) -> list[float]:
    """Seconds to the first token of each prompt; one goes before them, uncounted."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="inflash-") as folder,
        Server({"run_dir": folder} | settings, quiet=True) as server,
        Client(server.run_dir, timeout=CLIENT_S) as client,
    ):
        vocabulary = client.status()["model"]["vocabulary"]
        rows = np.random.default_rng(SEED).integers(3, vocabulary, (prompts + 1, tokens))
        for row in rows.tolist():
            answer = client.generate(row, max_new_tokens=1)
            list(answer)
            assert answer.stats is not None
            found.append(answer.stats.time_to_first_token_s)
    return found[1:]


if __name__ == "__main__":
    main(prog_name="python -m scripts.prefill")
