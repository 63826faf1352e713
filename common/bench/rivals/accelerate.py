"""transformers with accelerate's disk offload: what fits under the cap stays in memory, the rest is
mapped from the checkpoint when its module runs.

accelerate reads a safetensors checkpoint where it lies; of a pickled one it writes the part that
does not fit into the offload folder first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from common.bench.rivals.program import Options, Result, main, time_decoding
from common.bench.rivals.transformers_model import (
    keep_in_memory,
    make_step,
    open_model,
    versions,
)

PACKAGES = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate"}
PROCESS_BYTES = 500_000_000
"""What is not weights: 420 MB of libraries, KV cache, activations, pages on their way. accelerate
itself leaves room for one layer more."""


def contend(options: Options) -> Result:
    """Loads what fits, and decodes."""
    start = time.perf_counter()
    model = open_model(
        PACKAGES,
        options.model,
        "float16",
        options.threads,
        device_map="auto",
        max_memory={"cpu": max(0, options.own.cap - PROCESS_BYTES)},
        offload_folder=options.own.offload,
    )
    kept = keep_in_memory(model)
    load_ms = (time.perf_counter() - start) * 1e3
    timed = time_decoding(make_step(model, PACKAGES), options)
    note = (
        f"{kept:,} bytes of weights copied into memory, where transformers would map them and read"
        " them again for every token"
    )
    return Result("accelerate", versions(PACKAGES), load_ms, timed, note)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offload", type=Path, required=True)
    parser.add_argument("--cap", type=int, required=True, help="bytes")


if __name__ == "__main__":
    sys.exit(main(contend, PACKAGES, sys.argv[1:], _add_arguments))
