"""The shapes that checkpoints are planted in: published geometries by name, or any config.json.

Refuses what the plant does not know how to build: families without a plant, activations other than
relu, and layouts in which the FFN's input is not a norm of the whole residual stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, OPTConfig

from common.errors import UserError

HIDDEN_MIN = 64  # below it, random directions are too few to be nearly at right angles


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "llama-7b-relu": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "relu",
        "tie_word_embeddings": False,
    },
}
"""Settings of transformers' configuration, where they are not its defaults."""

_CLASSES = {"opt": OPTConfig, "llama": LlamaConfig}
_ARCHITECTURES = {"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}
# What the plant relies on, where a configuration may say otherwise.
_NEEDED: dict[str, dict[str, Any]] = {
    "opt": {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    "llama": {"hidden_act": "relu", "attention_bias": False, "mlp_bias": False},
}


def config_of(shape: str | Path) -> Any:
    """transformers' configuration of a shape, float16.

    `shape` is a name of SHAPES, or a path to a config.json. `UserError` for a name that is none, a
    file that is no configuration, and what cannot be planted.
    """
    named = SHAPES.get(str(shape))
    if named is not None:
        config = _CLASSES[named["model_type"]](**named)
    else:
        config = _load(Path(shape))
        _check(config, str(shape))
    config.dtype = torch.float16
    config.architectures = [_ARCHITECTURES[config.model_type]]
    return config


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"there is no shape {str(path)!r}: it is none of {', '.join(SHAPES)}, and no file of"
            " that name (give the path of a config.json)"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers checks values with a tree of errors of its own
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is refused by transformers: {reason}; give another") from None


def _check(config: Any, where: str) -> None:
    if config.model_type not in _NEEDED:
        raise UserError(
            f"{where}: model_type {config.model_type!r} cannot be planted; {', '.join(_NEEDED)} can"
        )
    for key, wanted in _NEEDED[config.model_type].items():
        if getattr(config, key) != wanted:
            raise UserError(
                f"{where}: {key} is {getattr(config, key)!r}; the plant needs {wanted!r}"
            )
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden < HIDDEN_MIN or heads < 2 or hidden % heads:
        raise UserError(
            f"{where}: hidden_size {hidden} with {heads} heads; the plant needs at least"
            f" {HIDDEN_MIN}, and 2 heads that divide it"
        )
    if config.model_type == "opt" and config.word_embed_proj_dim != hidden:
        raise UserError(
            f"{where}: word_embed_proj_dim is not hidden_size; the plant needs it to be"
        )
    if config.model_type == "llama" and config.rope_parameters["rope_type"] != "default":
        raise UserError(f"{where}: rope_type is not 'default'; the plant needs it so")
