"""What a layer costs in processes and messages: `python -m common.forecast.pipeline`, one line of
JSON.

A real server on a planted model so small that its products take next to no time, all of its FFN
cached: what is left of a token is Python, messages and the schedule of the four processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OPTConfig
from transformers.utils import logging

from common.errors import UserError
from common.launch import Server
from common.model.convert import Silent, convert
from common.planted.checkpoint import make_checkpoint
from common.planted.predictors import plant_predictors
from common.store.store import Store
from inflash import Client, Stats
from inflash._errors import InflashError

HIDDEN, NEURONS, LAYERS, HEADS, VOCABULARY, CONTEXT = 256, 1024, 8, 4, 512, 256
PROMPT, ANSWER, WARM_UP = 24, 48, 24  # tokens
CLIENT_S = 60.0


def main() -> int:
    """The program. Returns the exit status."""
    logging.disable_progress_bar()
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=NEURONS,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    config.dtype, config.architectures = torch.float16, ["OPTForCausalLM"]
    try:
        with tempfile.TemporaryDirectory(prefix="inflash-") as folder:
            checkpoint, made = Path(folder) / "checkpoint", Path(folder) / "store"
            make_checkpoint(config, checkpoint, 0, Silent())
            convert(checkpoint, made)
            store = Store.open(made)
            plant_predictors(checkpoint, store)
            found = _serve(store, Path(folder) / "run")
    except (UserError, InflashError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def _serve(store: Store, run_dir: Path) -> dict[str, Any]:
    """A token's milliseconds for a layer, after a warm-up; and the start's seconds."""
    random = np.random.default_rng(0)
    settings = {"store": str(store.path), "run_dir": str(run_dir), "cache": "100%", "reuse": "off",
                "context": f"{CONTEXT}"}  # fmt: skip
    began = time.perf_counter()
    with Server(settings, quiet=True) as server, Client(server.run_dir, timeout=CLIENT_S) as client:
        start_s = time.perf_counter() - began
        for tokens in (WARM_UP, ANSWER):
            prompt, answer = (random.integers(0, VOCABULARY, n).tolist() for n in (PROMPT, tokens))
            generation = client.generate(
                prompt, max_new_tokens=tokens, forced=answer, ignore_eos=True
            )
            for _ in generation:
                pass
    stats: Stats | None = generation.stats
    if stats is None:
        raise UserError(f"the server did not answer: {generation.finish_reason}")
    count = stats.new_tokens - 1
    return {
        "start_s": start_s,
        "layer_ms": 1e3 * stats.decode_s / count / LAYERS,
        "named_per_layer": (stats.decode_hits + stats.decode_misses) / count / LAYERS,
    }


if __name__ == "__main__":
    sys.exit(main())
