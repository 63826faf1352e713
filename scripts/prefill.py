"""How long a prompt takes beside what this machine allows: `python -m scripts.prefill STORE`.

A server is asked for one token after --tokens of prompt, some times, each with another prompt. By
turns with it, while it is idle, programs of their own measure what the time cannot fall below, of
which the larger counts:

    read_s      bytes of the FFN, once a block of tokens ÷ bytes that the drive gives in a second
    multiply_s  operations of all products with weights ÷ those of one large product, a second, by
                torch with all threads; the better of before and after the prompt, and of float32
                and integers (common/halves.py), for rows that may be multiplied so

Beside it stands the ratio to what it would be with float32 alone.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from common.bench.floors import drive_bytes_per_s
from common.errors import UserError
from common.forecast.shapes import multiplied_bytes
from common.halves import PRODUCTS
from common.launch import Server
from common.limits import READ_BYTES_MAX
from common.plan import make_plan
from common.probes import measure_drive, measure_products
from common.store.store import Store
from inflash import Client
from inflash._errors import InflashError
from scripts.options import server_options

SEED = 1
CLIENT_S = 600.0


@dataclass(frozen=True)
class Work:
    """What a prompt takes of the machine."""

    ffn_bytes: int
    drive_bytes_per_s: float
    operations: dict[str, float]  # by the number format of the rows

    @property
    def read_s(self) -> float:
        return self.ffn_bytes / self.drive_bytes_per_s

    def float32_s(self, gemm: dict[str, float]) -> float:
        """Of the products, at so many operations a second by `measure_products`."""
        return sum(self.operations.values()) / gemm["float32"]

    def multiply_s(self, gemm: dict[str, float]) -> float:
        """The same, of each number format in the faster way."""
        return sum(
            count / max(gemm["float32"], gemm["int8"] / PRODUCTS.get(name, math.inf))
            for name, count in self.operations.items()
        )


@dataclass(frozen=True)
class Timed:
    """A prompt's time, and what the cores did beside it."""

    seconds: float
    multiply_s: float
    float32_s: float
    ratio: float  # to the larger of the floors
    float32_ratio: float


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--tokens", default=512, show_default=True, help="Of a prompt.")
@click.option("--prompts", default=5, show_default=True, help="How many, each another.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@server_options
def main(store: Path, tokens: int, prompts: int, as_json: bool, **options: str | None) -> None:
    """Measure prompts of STORE on this machine, and the floors of their time."""
    given = {key: value for key, value in options.items() if value is not None}
    settings = {"store": str(store.absolute()), "context": f"{tokens + 1}"} | given
    try:
        work = work_of(Store.open(store), tokens, settings)
        timed = ask(work, tokens, prompts, settings)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    ratio = statistics.median(one.ratio for one in timed)
    if as_json:
        found = asdict(work) | {"tokens": tokens, "read_s": work.read_s, "ratio": ratio}
        print(json.dumps(found | {"prompts": [asdict(one) for one in timed]}))
        return
    print(f"reads     {work.read_s:6.2f} s: {work.ffn_bytes / 1e9:.2f} GB at"
          f" {work.drive_bytes_per_s / 1e9:.2f} GB/s")  # fmt: skip
    print(f"multiplies {sum(work.operations.values()) / 1e12:6.3f} T operations")
    for one in timed:
        print(f"products  {one.multiply_s:6.2f} s, {one.float32_s:6.2f} s in float32; the prompt"
              f" {one.seconds:.2f} s, {one.ratio:.2f} × the larger, {one.float32_ratio:.2f} × in"
              " float32")  # fmt: skip
    print(f"median    {ratio:6.2f} ×")


def work_of(store: Store, tokens: int, settings: dict[str, str]) -> Work:
    """What a prompt reads and multiplies, and how fast the drive is."""
    geometry = store.geometry
    bundles = max(min(READ_BYTES_MAX // geometry.stride_bytes, geometry.neurons), 1)
    drive = measure_drive(store.path, "--bundles", f"{bundles}")
    sizes = {name: tensor.nbytes for name, tensor in store.resident_tensors().items()}
    head = max(sizes.values())  # the embedding's, or the head's: of a prompt one row is multiplied
    resident = (multiplied_bytes(sizes) - head) // geometry.item_bytes
    ffn = geometry.layers * geometry.neurons * len(geometry.parts) * geometry.hidden
    packed = settings.get("resident", "float")
    operations = dict[str, float]()
    for name, weights in (
        (geometry.compute_dtype if packed == "float" else packed, resident),
        (geometry.number_format, ffn),
    ):
        operations[name] = operations.get(name, 0.0) + 2.0 * weights * tokens
    blocks = math.ceil(tokens / make_plan(Server(settings).settings, store).block)
    speed = drive_bytes_per_s(drive["points"], READ_BYTES_MAX)
    return Work(blocks * geometry.ffn_bytes, speed, operations)


def ask(work: Work, tokens: int, prompts: int, settings: dict[str, str]) -> list[Timed]:
    """Each prompt, timed; one goes before them, uncounted."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="inflash-") as folder,
        Server({"run_dir": folder} | settings, quiet=True) as server,
        Client(server.run_dir, timeout=CLIENT_S) as client,
    ):
        vocabulary = client.status()["model"]["vocabulary"]
        rows = np.random.default_rng(SEED).integers(3, vocabulary, (prompts + 1, tokens))
        first_token_s(client, rows[0].tolist())
        before = measure_products("--gemm")["gemm"]
        for row in rows[1:].tolist():
            seconds = first_token_s(client, row)
            after = measure_products("--gemm")["gemm"]
            best = {name: max(before[name], after[name]) for name in before}
            floors = work.multiply_s(best), work.float32_s(best)
            ratios = (seconds / max(floor, work.read_s) for floor in floors)
            found.append(Timed(seconds, *floors, *ratios))
            before = after
    return found


def first_token_s(client: Client, prompt: list[int]) -> float:
    """Seconds to the first token of an answer."""
    answer = client.generate(prompt, max_new_tokens=1)
    list(answer)
    assert answer.stats is not None
    return answer.stats.time_to_first_token_s


if __name__ == "__main__":
    main(prog_name="python -m scripts.prefill")
