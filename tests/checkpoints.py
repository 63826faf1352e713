"""Tiny random-weight checkpoints in Hugging Face layout, one variant per FFN shape we convert.

Every folder has config.json, generation_config.json, weights and a byte-level BPE tokenizer whose
ids fit the vocabulary. Weights are large enough that logits differ and the greedy path wanders;
the end token's row is zero, so that a greedy answer does not end by chance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    logging,
)

VOCAB = 300
CONTEXT = 512
BOS, PAD, EOS = 0, 1, 2

_TEXT = ["def read(path):\n    return open(path).read()\n", "for name in names:\n    print(name)\n"]


@dataclass(frozen=True)
class Variant:
    """Overrides of a family's small configuration, and of its config.json once it is written."""

    family: str  # "opt" or "llama"
    config: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "opt": Variant("opt"),
    "opt-postln": Variant("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "opt-nobias": Variant("opt", {"enable_bias": False}),
    "opt-untied": Variant("opt", {"tie_word_embeddings": False}),
    "opt-noaffine": Variant("opt", {"layer_norm_elementwise_affine": False}),
    "llama-relu": Variant("llama"),
    "llama-relu2": Variant("llama", {"hidden_act": "relu2"}),
    # As MiniCPM-S and ProSparse checkpoints write it; transformers has no such activation.
    "llama-fatrelu": Variant("llama", {}, {"hidden_act": "fatrelu", "hidden_act_param": 0.01}),
    "llama-gqa": Variant("llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "llama-mlp-bias": Variant("llama", {"mlp_bias": True}),
    "llama-tied": Variant("llama", {"tie_word_embeddings": True}),
}


def make_checkpoint(
    folder: Path,
    variant: str,
    dtype: str = "float32",
    sharded: bool = False,
    pickled: bool = False,
    seed: int = 0,
) -> Path:
    """Writes the checkpoint `variant` into `folder` and returns it.

    `dtype` is float32, float16 or bfloat16. `sharded` splits the weights over several files with
    an index; `pickled` writes pytorch_model*.bin instead of safetensors.
    """
    logging.disable_progress_bar()
    chosen = VARIANTS[variant]
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model: Any = random_model(make_config(chosen), seed)
    model.to(torch_dtype)
    model.config.dtype = torch_dtype
    model.save_pretrained(folder, max_shard_size="150KB" if sharded else "1GB")
    if pickled:
        _pickle_weights(folder, model, sharded)
    if chosen.written:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | chosen.written, indent=2))
    make_tokenizer().save_pretrained(folder)
    return folder


def make_config(variant: Variant) -> PreTrainedConfig:
    """The configuration of a variant, as transformers' own class takes it."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    if variant.family == "opt":
        return OPTConfig(**common | {"ffn_dim": 256, "dropout": 0.0} | variant.config)
    llama = {"intermediate_size": 160, "hidden_act": "relu", "num_key_value_heads": 4}
    return LlamaConfig(**common | llama | variant.config)


def random_model(config: PreTrainedConfig, seed: int) -> nn.Module:
    """A model of `config` with weights drawn from `seed`: float32, eval mode."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.1 if name.endswith("bias") else _scale(name)))
        for row in (PAD, EOS):
            model.get_input_embeddings().weight[row] = 0.0
            model.get_output_embeddings().weight[row] = 0.0
    return model


def _scale(name: str) -> float:
    # Positions that weigh more than the tokens keep tied models from repeating their last token.
    return 0.6 if "embed_positions" in name else 0.2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCAB tokens; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )


def _pickle_weights(folder: Path, model: Any, sharded: bool) -> None:
    """Replaces the safetensors by what older versions of transformers wrote."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    tied = model.config.tie_word_embeddings
    weights = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    if not sharded:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = list(weights)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file_name = f"pytorch_model-{number:05}-of-00002.bin"
        # A clone each: a view would carry its whole storage into the file.
        torch.save({name: weights[name].clone() for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
