"""How fast this machine makes compute's products: `python -m services.compute.speeds`, one JSON
line.

    decode   bytes per second of one token's products: resident matrices, a named neuron's first
             row, a firing neuron's other rows, keys and values
    block    seconds per byte of a block of BLOCK_ROWS tokens: resident matrices, and an FFN that
             fires 3.3 %
    gemm     of a prompt's block of GEMM_ROWS tokens: operations per second of one product of
             torch's, by all threads, where nothing is laid out and nothing read: of float32, and of
             int8 numbers, of which rows of 16 bits would need two or three products for one

By the number format of the store: a bfloat16 one is computed in float32, and its resident bytes are
counted as float32. measure.py compares other ways to make the same products.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from common.store.geometry import DTYPE_BYTES, Geometry
from common.system import cores
from services.compute.attention import attend
from services.compute.blocks import Tokens, probe_blocks
from services.compute.linear import RowLinear, rows_of
from services.compute.products import Products, Sums, bits_of
from services.compute.rows import CacheRows

HIDDEN = 4096
SLOTS, NAMED, FIRED = 2000, 1600, 500
RESIDENT = 4  # matrices in turn: more than the caches of a core hold
HEADS, WIDTH, TOKENS = 32, 128, 512
TURNS = 5
BLOCK_ROWS = (16, 128)
BLOCK_OUT = 1024  # rows of a block's matrix
BLOCK_TURNS = 3
FIRES_ABOVE = 1.84  # standard deviations: 3.3 % do, as in OPT 6.7B
GEMM_ROWS = 512


def decode(dtype: str, products: Products) -> dict[str, float]:
    """Bytes per second, by product."""
    computed = _torch(Geometry(1, 1, 1, False, dtype).compute_dtype)
    x = torch.randn(HIDDEN)
    linears = [_linear(HIDDEN, computed, products) for _ in range(RESIDENT)]
    rows, geometry = _rows(dtype, products)
    row_bytes = HIDDEN * geometry.item_bytes
    named, fired = (torch.randperm(SLOTS)[:count].sort().values.numpy() for count in (NAMED, FIRED))
    vectors = rows.vectors(x[None])
    weights, out = torch.randn(1, FIRED).numpy(), np.zeros((1, HIDDEN), np.float32)
    key, value = (torch.randn(1, HEADS, TOKENS, WIDTH).to(computed) for _ in "kv")
    query = torch.randn(1, HEADS, 1, WIDTH).to(computed)
    made: dict[str, tuple[Callable[[], Any], int]] = {
        "resident": (lambda: [linear(x) for linear in linears],
                     RESIDENT * linears[0].rows.items.nbytes),
        "named": (lambda: rows.dot("up", named, vectors), NAMED * row_bytes),
        "fired": (lambda: rows.add("down", fired, weights, out), FIRED * row_bytes),
        "context": (lambda: attend(nn.Identity(), query, key, value, None), 2 * key.nbytes),
    }  # fmt: skip
    return {name: size / _seconds(make, TURNS) for name, (make, size) in made.items()}


def block(dtype: str, products: Products) -> dict[str, list[float]]:
    """Seconds per byte at each of BLOCK_ROWS, by kind of weights."""
    computed = _torch(Geometry(1, 1, 1, False, dtype).compute_dtype)
    linear = _linear(BLOCK_OUT, computed, products)
    rows, geometry = _rows(dtype, products)
    slots = np.arange(BLOCK_OUT)
    found: dict[str, list[float]] = {"resident": [], "ffn": []}
    for count in BLOCK_ROWS:
        x = torch.randn(count, HIDDEN)
        tokens, sums, h = rows.tokens(x), rows.sums(count, HIDDEN), torch.empty(BLOCK_OUT, count)

        def ffn(tokens: Tokens = tokens, sums: Sums = sums, h: torch.Tensor = h) -> None:
            def activate(first: int, end: int, z: torch.Tensor) -> None:
                h[first:end] = (z - FIRES_ABOVE * HIDDEN**0.5).relu()

            rows.dot_block("up", slots, tokens, activate)
            rows.add_block("down", slots, h, sums)

        seconds = _seconds(functools.partial(linear, x), BLOCK_TURNS)
        found["resident"].append(seconds / linear.rows.items.nbytes)
        found["ffn"].append(_seconds(ffn, BLOCK_TURNS) / (BLOCK_OUT * geometry.bundle_bytes))
    return found


def gemm(products: Products, threads: int) -> dict[str, float]:
    """Operations per second. In float32 by torch's threads, the faster of two ways to lay a product
    out; of int8 numbers by ours: torch's took now 6 ms, now 10 (docs/measurements.md)."""
    x, matrix = torch.randn(GEMM_ROWS, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    numbers, rows = ((each * 20).to(torch.int8) for each in (x, matrix))
    out = torch.empty(HIDDEN, GEMM_ROWS, dtype=torch.int32)

    def multiply(first: int, end: int) -> None:
        torch._int_mm(rows[first:end], numbers.T, out=out[first:end])

    torch.set_num_threads(threads)
    ways: list[Callable[[], Any]] = [lambda: x @ matrix.T, lambda: matrix @ x.T]
    seconds = {"float32": min(_seconds(way, TURNS) for way in ways)}
    torch.set_num_threads(1)
    seconds["int8"] = _seconds(lambda: products.share(HIDDEN, HIDDEN, multiply), TURNS)
    return {name: 2 * x.numel() * HIDDEN / each for name, each in seconds.items()}


def _torch(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _linear(outputs: int, dtype: torch.dtype, products: Products) -> RowLinear:
    return RowLinear(rows_of(torch.randn(outputs, HIDDEN).to(dtype)), None, products)


def _rows(dtype: str, products: Products) -> tuple[CacheRows, Geometry]:
    geometry = Geometry(layers=1, neurons=SLOTS, hidden=HIDDEN, gated=False, dtype=dtype)
    values = torch.randn(SLOTS, 2 * HIDDEN).to(_torch(dtype))
    return CacheRows(bytearray(bits_of(values).tobytes()), geometry, products), geometry


def _seconds(make: Callable[[], Any], turns: int) -> float:
    make()  # kernels are made, pages are there
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        make()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(arguments: Sequence[str]) -> int:
    """The program. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=cores(), help="of compute")
    parser.add_argument("--gemm", action="store_true", help="that alone: seconds, not minutes")
    given = parser.parse_args(arguments)
    products = Products(given.threads, probe_blocks().halved)
    torch.manual_seed(0)
    with torch.inference_mode():
        found: dict[str, Any] = {"threads": given.threads, "gemm": gemm(products, given.threads)}
        if not given.gemm:
            found["decode"] = {dtype: decode(dtype, products) for dtype in DTYPE_BYTES}
            found["block"] = {dtype: block(dtype, products) for dtype in DTYPE_BYTES}
            found["block_rows"] = BLOCK_ROWS
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
