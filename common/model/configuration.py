"""What a store holds of a checkpoint's configuration and tokenizer, as conversion writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from common.errors import StoreError
from common.model.checkpoint import Checkpoint

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def make_config(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files, in `folder`."""
    if checkpoint.has_tokenizer:
        _make_tokenizer(checkpoint.folder, folder)
    # Code that a checkpoint brings along is never run, so the store does not name it.
    config = {k: v for k, v in checkpoint.config_json.items() if k != "auto_map"}
    # What the services read, where the checkpoint relies on its family's defaults.
    for key in CONFIG_KEYS:
        if key not in config and hasattr(checkpoint.config, key):
            config[key] = getattr(checkpoint.config, key)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    else:
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


def _make_tokenizer(source: Path, folder: Path) -> None:
    """Every form of tokenizer becomes tokenizer.json, the one that the gateway reads."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of any kind
        reason = " ".join(str(error).split())
        raise StoreError(f"the tokenizer in {source} cannot be loaded: {reason}") from None
    if not (folder / "tokenizer.json").is_file():
        raise StoreError(f"the tokenizer in {source} has no fast form (tokenizer.json)")
