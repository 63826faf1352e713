"""The contender that does nothing clever: the whole model is read from flash for every token.

Embeddings and head stay in memory; every layer's weights are read, multiplied and dropped
(common/model/streamed.py), out of a cold page cache. A token is a forward pass of its own, without
KV cache: what a token would attend to costs little beside reading all weights.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from common.bench.rivals.program import Options, Result, main, time_decoding
from common.model.streamed import load_streamed, run
from common.store.store import Store, forget_pages

PACKAGES = {"torch": "torch", "transformers": "transformers"}


def contend(options: Options) -> Result:
    """Loads what lies around the layers, and decodes."""
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    store = Store.open(options.model)
    model = load_streamed(store, keep_bytes=0)
    load_ms = (time.perf_counter() - start) * 1e3

    def step(ids: list[int]) -> int:
        _forget(store)
        scores = next(run(model, np.array([ids]), batch=1))
        return int(scores.top[0, -1])

    timed = time_decoding(step, options)
    note = "every weight of every layer is read for every token; the FFN is computed in float32"
    return Result("whole model per token", torch.__version__, load_ms, timed, note)


def _forget(store: Store) -> None:
    """Drops resident tensors' pages: bundles drop their own as they are read."""
    for path in store.resident_paths():
        with path.open("rb") as file:
            forget_pages(file.fileno())


if __name__ == "__main__":
    sys.exit(main(contend, PACKAGES, sys.argv[1:]))
