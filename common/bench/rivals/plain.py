"""Plain transformers: the checkpoint wholly in memory, one process, the library as it is."""

from __future__ import annotations

import sys
import time

from common.bench.rivals.program import Options, Result, main, time_decoding
from common.bench.rivals.transformers_model import (
    DTYPES,
    keep_in_memory,
    make_step,
    open_model,
    versions,
)

PACKAGES = {"torch": "torch", "transformers": "transformers"}


def contend(options: Options) -> Result:
    """Loads the checkpoint into memory and decodes."""
    start = time.perf_counter()
    dtype = options.own.dtype
    model = open_model(PACKAGES, options.model, dtype, options.threads)
    kept = keep_in_memory(model)
    load_ms = (time.perf_counter() - start) * 1e3
    timed = time_decoding(make_step(model, PACKAGES), options)
    note = f"computed in {dtype}, {kept:,} bytes of weights in memory"
    return Result("transformers", versions(PACKAGES), load_ms, timed, note)


if __name__ == "__main__":
    sys.exit(
        main(
            contend,
            PACKAGES,
            sys.argv[1:],
            lambda parser: parser.add_argument("--dtype", choices=DTYPES, default="float16"),
        )
    )
