"""How fast the pieces of a decode step run here, each way beside the way that compute takes.

Times, for one token and in turn, ways to multiply a resident matrix, bundles as they lie in the
cache, and keys and values. Prints microseconds (medians) and ratios to the way that is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import click
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from common.kernels import BITS, row_starts
from common.store.geometry import GROUP, Geometry, row_bytes
from services.compute.attention import attend
from services.compute.linear import RowLinear, Rows, rows_of
from services.compute.products import Products
from services.compute.rows import CacheRows
from services.compute.turns import median_us

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
                show(str(dtype)[6:], kind)
        for kind in packed(hidden):
            show("", kind)


def packed(hidden: int) -> list[Ways]:
    """Our kernels by number format, and torch's over packed matrices."""
    products, random = Products(torch.get_num_threads()), torch.randn(SLOTS, hidden)
    named, fired = (torch.randperm(SLOTS)[:count].sort().values for count in (NAMED, FIRED))
    x, h = torch.randn(hidden), torch.randn(1, FIRED).numpy()
    out = np.zeros((1, hidden), np.float32)
    up: dict[str, Callable[[], object]] = {}
    down: dict[str, Callable[[], object]] = {}
    resident: dict[str, Callable[[], object]] = {}
    for name in ("float16", "int8", "int4"):
        kind = "" if name == "float16" else name
        geometry = Geometry(1, SLOTS, hidden, False, "float16", kind)
        part = random_rows(random, name, products)
        bundles = np.zeros((SLOTS, geometry.stride_bytes), np.uint8)
        for begin in (0, geometry.row_bytes):
            bundles[:, begin : begin + geometry.row_bytes] = part
        rows = CacheRows(bytearray(bundles), geometry, products)
        up[f"up, {NAMED} rows: {name}"] = functools.partial(
            rows.dot, "up", named.numpy(), rows.vectors(x[None])
        )
        down[f"down, {FIRED} rows: {name}"] = functools.partial(
            rows.add, "down", fired.numpy(), h, out
        )
        matrices = [
            random_rows(torch.randn(hidden, hidden), name, products) for _ in range(RESIDENT)
        ]
        starts = row_starts(hidden, part.shape[1] // np.dtype(BITS[name]).itemsize)
        linears = [
            RowLinear(Rows(matrix.reshape(-1).view(BITS[name]), starts), None, products)
            for matrix in matrices
        ]
        resident[f"resident: {name}"] = functools.partial(_each, linears, x)
    return [up, down, {**resident, **torch_packed(hidden)}]


def random_rows(values: torch.Tensor, name: str, products: Products) -> npt.NDArray[np.uint8]:
    """uint8 [rows, row_bytes]"""
    if name == "float16":
        return values.half().view(torch.uint8).numpy()
    raw = np.zeros((len(values), row_bytes(name, values.shape[1])), np.uint8)
    items = raw.reshape(-1).view(BITS[name])
    products.pack(values.numpy(), items, row_starts(*raw.shape))
    return raw


def torch_packed(hidden: int) -> Ways:
    """torch's own products of one row with int8 and int4 matrices, which take bfloat16 best."""
    x, scales = torch.randn(1, hidden), torch.rand(hidden)
    eights = [torch.randint(-127, 128, (hidden, hidden), dtype=torch.int8) for _ in range(RESIDENT)]
    numbers = torch.randint(0, 16, (hidden, hidden), dtype=torch.int32)
    pack, multiply = (
        torch.ops.aten._convert_weight_to_int4pack_for_cpu,
        torch.ops.aten._weight_int4pack_mm_for_cpu,
    )
    fours = [pack(numbers, 1) for _ in range(RESIDENT)]
    ways: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        row, each = x.to(dtype), scales.to(dtype)
        both = torch.rand(hidden // GROUP, hidden, 2).to(dtype)
        ways[f"resident: torch's int8, {str(dtype)[6:]}"] = functools.partial(
            lambda row, each: [torch._weight_int8pack_mm(row, m, each) for m in eights], row, each
        )
        ways[f"resident: torch's int4, {str(dtype)[6:]}"] = functools.partial(
            lambda row, both: [multiply(row, m, GROUP, both) for m in fours], row, both
        )
    return ways


def _each(linears: Sequence[RowLinear], x: torch.Tensor) -> None:
    for linear in linears:
        linear(x)


def resident(dtype: torch.dtype, hidden: int) -> Ways:
    matrices = [torch.randn(hidden, hidden).to(dtype) for _ in range(RESIDENT)]
    x = torch.randn(hidden).to(dtype)
    products = Products(torch.get_num_threads())
    rows = [RowLinear(rows_of(matrix), None, products) for matrix in matrices]
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
    x, h = torch.randn(hidden), torch.randn(FIRED)
    vectors, weights = rows.vectors(x[None]), h[None].numpy()
    sums = np.zeros((1, hidden), np.float32)
    named, fired = (torch.randperm(SLOTS)[:count].sort().values for count in (NAMED, FIRED))
    every, start = torch.arange(FIRED), torch.zeros(1, dtype=torch.int64)

    def bag(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, matrix, start, mode="sum", per_sample_weights=h.to(dtype))

    return [
        {
            f"up, {NAMED} rows: our kernel": lambda: rows.dot("up", named.numpy(), vectors),
            "up: gathered, mv": lambda: torch.mv(up.index_select(0, named), x.to(dtype)),
        },
        {
            f"down, {FIRED} rows: our kernel": lambda: rows.add(
                "down", fired.numpy(), weights, sums
            ),
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


def show(dtype: str, ways: Ways) -> None:
    times = median_us(ways, TURNS)
    first = next(iter(times.values()))
    for name, us in times.items():
        print(f"{dtype:9} {name:48} {us:8.0f} µs  {us / first:5.2f}×")


if __name__ == "__main__":
    main(prog_name="python -m services.compute.measure")
