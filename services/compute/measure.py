"""How fast the pieces of a decode step run here, each way beside the way that compute takes.

Times, for one token and in turn, ways to multiply a resident matrix, bundles as they lie in the
cache, and keys and values. Prints microseconds (medians) and ratios to the way that is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import click
import torch
import torch.nn.functional as F
from torch import nn

from common.store.geometry import Geometry
from services.compute.attention import attend
from services.compute.linear import RowLinear
from services.compute.products import Products
from services.compute.rows import CacheRows

SLOTS, NAMED, FIRED, TURNS = 2000, 1600, 500, 9
HEADS, WIDTH = 32, 128
RESIDENT = 8  # matrices in turn: more than the caches of a core hold

Ways = Mapping[str, Callable[[], object]]


@click.command()
@click.option("--hidden", default=4096, show_default=True, help="Length of a row.")
@click.option("--threads", default=1, show_default=True)
@click.option("--tokens", default=500, show_default=True, help="Of context, for attention.")
def main(hidden: int, threads: int, tokens: int) -> None:
    """Time the ways to make a decode step's products; the first of each kind is the one taken."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16):
            for kind in (
                resident(dtype, hidden),
                *bundles(dtype, hidden),
                attention(dtype, tokens),
            ):
                show(dtype, kind)


def resident(dtype: torch.dtype, hidden: int) -> Ways:
    matrices = [torch.randn(hidden, hidden).to(dtype) for _ in range(RESIDENT)]
    x = torch.randn(hidden).to(dtype)
    linears = [nn.Linear(hidden, hidden, bias=False) for _ in matrices]
    for linear, matrix in zip(linears, matrices, strict=True):
        linear.weight = nn.Parameter(matrix, requires_grad=False)
    rows = [RowLinear(linear, Products(torch.get_num_threads())) for linear in linears]
    return {
        "resident: our kernel": lambda: [row(x) for row in rows],
        "resident: mv": lambda: [torch.mv(m, x) for m in matrices],
        "resident: linear": lambda: [F.linear(x[None], m) for m in matrices],
    }


def bundles(dtype: torch.dtype, hidden: int) -> list[Ways]:
    """Of the up side and of the down side."""
    name = str(dtype).removeprefix("torch.")
    geometry = Geometry(layers=1, neurons=SLOTS, hidden=hidden, gated=False, dtype=name)
    cache = torch.randn(SLOTS, geometry.stride_bytes // geometry.item_bytes).to(dtype)
    region = bytearray(cache.numpy().tobytes())
    rows = CacheRows(region, geometry, Products(torch.get_num_threads()))
    up, down = cache[:, :hidden], cache[:, hidden : 2 * hidden]
    x, h, out = torch.randn(hidden), torch.randn(FIRED), torch.zeros(hidden)
    named, fired = (torch.randperm(SLOTS)[:count].sort().values for count in (NAMED, FIRED))
    every, start = torch.arange(FIRED), torch.zeros(1, dtype=torch.int64)

    def bag(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, matrix, start, mode="sum", per_sample_weights=h.to(dtype))

    return [
        {
            f"up, {NAMED} rows: our kernel": lambda: rows.dot("up", named, x),
            "up: gathered, mv": lambda: torch.mv(up.index_select(0, named), x.to(dtype)),
        },
        {
            f"down, {FIRED} rows: our kernel": lambda: rows.add("down", fired, h, out),
            "down: embedding_bag of the matrix": lambda: bag(cache.view(-1, hidden), fired * 2 + 1),
            "down: gathered, embedding_bag": lambda: bag(down.index_select(0, fired), every),
            "down: embedding_bag of a slice": lambda: bag(down, fired),
            "down: gathered, vector @ matrix": lambda: h.to(dtype) @ down.index_select(0, fired),
        },
    ]


def attention(dtype: torch.dtype, tokens: int) -> Ways:
    key, value = (torch.randn(1, HEADS, tokens + 64, WIDTH).to(dtype) for _ in "kv")
    query = torch.randn(1, HEADS, 1, WIDTH).to(dtype)
    key, value = key[:, :, :tokens], value[:, :, :tokens]
    return {
        f"attention, {tokens} tokens: as compute does": lambda: attend(
            torch.nn.Identity(), query, key, value, None
        ),
        "attention: scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            query, key, value
        ),
    }


def show(dtype: torch.dtype, ways: Ways) -> None:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            found[name].append((time.perf_counter() - began) * 1e6)
    times = {name: statistics.median(each) for name, each in found.items()}
    first = next(iter(times.values()))
    for name, us in times.items():
        print(f"{str(dtype)[6:]:9} {name:48} {us:8.0f} µs  {us / first:5.2f}×")


if __name__ == "__main__":
    main(prog_name="python -m services.compute.measure")
