"""A GGUF file (F16) from a checkpoint, for llama.cpp: streamed, a tensor at a time.

A Llama keeps its own weights, with the rows of q and k in llama.cpp's order. llama.cpp has no OPT:
that becomes a Llama of the same shape, with as many layers, heads, tokens and FFN bytes, its
matrices filled with the OPT's bytes. What it says means nothing; it is read and multiplied like the
real thing. Neither has a vocabulary: a bench feeds ids. Refuses what llama.cpp would compute
differently without a word: biases, scaled RoPE.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.bench.rivals.program import load
from common.errors import StoreError
from common.model.checkpoint import Checkpoint, open_checkpoint
from common.store.partial import sync_folder
from common.store.tensors import Tensor, to_float32

Array = npt.NDArray[Any]

PACKAGES = {"gguf": "gguf"}
_ROUND = 32  # neurons: an FFN's width that llama.cpp's kernels like


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    source: Tensor | None  # None: ones
    start: int = 0  # in the source, counted in elements
    heads: int | None = None  # of q and k: their rows are permuted head by head

    @property
    def dtype(self) -> npt.DTypeLike:
        # llama.cpp multiplies matrices of 16 bits, and asks for vectors of 32.
        return np.float16 if len(self.shape) > 1 else np.float32

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self) -> Array:
        """Its values, in its shape and type."""
        if self.source is None:
            return np.ones(self.shape, self.dtype)
        source = self.source
        item = source.nbytes // math.prod(source.shape)
        raw = np.empty(math.prod(self.shape) * item, np.uint8)
        source.read_into(raw.data, self.start * item)
        if source.dtype == "float16":
            values: Array = raw.view(np.float16)
        else:
            values = to_float32(raw, source.dtype)
        values = values.astype(self.dtype, copy=False).reshape(self.shape)
        return values if self.heads is None else _permuted(values, self.heads)


def write_gguf(
    folder: Path, path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """Writes the checkpoint in `folder` as the GGUF file `path`; returns a sentence on what differs
    between the two, which is in the file, too ("general.description").

    A file appears only when it is whole. `progress` is called with bytes written and their total
    after each tensor. `StoreError` for a checkpoint that llama.cpp would not compute as it is.
    """
    gguf = load("gguf", PACKAGES)
    checkpoint = open_checkpoint(folder)
    model = checkpoint.config.model_type
    entries = _opt_entries(checkpoint) if model == "opt" else _llama_entries(checkpoint)
    note = _note(checkpoint)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        writer.add_description(note)
        _add_config(writer, gguf, checkpoint, entries)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(entry.dtype), entry.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(entry.nbytes for entry in entries)
        for entry in entries:
            writer.write_tensor_data(entry.read())
            done += entry.nbytes
            progress(done, total)
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return note


def _note(checkpoint: Checkpoint) -> str:
    if checkpoint.config.model_type == "opt":
        return (
            "llama.cpp has no OPT: a Llama with SiLU of the same shape and bytes, filled with the"
            " OPT's weights; llama.cpp multiplies every neuron"
        )
    activation = checkpoint.config.hidden_act
    if activation == "silu":
        return "the same weights and activation"
    return f"the same weights with SiLU, not {activation}: llama.cpp multiplies every neuron"


def _add_config(writer: Any, gguf: Any, checkpoint: Checkpoint, entries: list[_Entry]) -> None:
    config = checkpoint.config
    heads = config.num_attention_heads
    by_name = {entry.name: entry for entry in entries}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(by_name["blk.0.ffn_gate.weight"].shape[0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_freq_base(_rope_theta(checkpoint))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_vocab_size(by_name["token_embd.weight"].shape[0])
    writer.add_tokenizer_model("no_vocab")


def _llama_entries(checkpoint: Checkpoint) -> list[_Entry]:
    config, tensors = checkpoint.config, checkpoint.tensors
    if biased := sorted(name for name in tensors if name.endswith(".bias")):
        raise StoreError(f"{checkpoint.folder}: no GGUF is written of a Llama with {biased[0]}")

    def entry(name: str, source: str, heads: int | None = None) -> _Entry:
        tensor = _tensor(checkpoint, source)
        return _Entry(name, tensor.shape, tensor, heads=heads)

    entries = [entry("token_embd.weight", "model.embed_tokens.weight")]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        entries += [
            entry(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight"),
            entry(
                f"{theirs}.attn_q.weight",
                f"{ours}.self_attn.q_proj.weight",
                config.num_attention_heads,
            ),
            entry(
                f"{theirs}.attn_k.weight",
                f"{ours}.self_attn.k_proj.weight",
                config.num_key_value_heads,
            ),
            entry(f"{theirs}.attn_v.weight", f"{ours}.self_attn.v_proj.weight"),
            entry(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight"),
            entry(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight"),
            entry(f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight"),
            entry(f"{theirs}.ffn_up.weight", f"{ours}.mlp.up_proj.weight"),
            entry(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight"),
        ]
    entries.append(entry("output_norm.weight", "model.norm.weight"))
    if not config.tie_word_embeddings:  # else llama.cpp takes the embedding
        entries.append(entry("output.weight", "lm_head.weight"))
    return entries


def _opt_entries(checkpoint: Checkpoint) -> list[_Entry]:
    config = checkpoint.config
    hidden, neurons = config.hidden_size, config.ffn_dim
    if config.word_embed_proj_dim != hidden:
        raise StoreError(f"{checkpoint.folder}: an OPT that projects its embedding has no Llama")
    width = round(2 * neurons / 3 / _ROUND) * _ROUND  # three matrices for OPT's two

    def entry(name: str, shape: tuple[int, ...], source: str, start: int = 0) -> _Entry:
        return _Entry(name, shape, _tensor(checkpoint, source), start)

    def ones(name: str) -> _Entry:
        return _Entry(name, (hidden,), None)

    embedding = _tensor(checkpoint, "model.decoder.embed_tokens.weight")
    entries = [_Entry("token_embd.weight", embedding.shape, embedding)]
    square, wide, tall = (hidden, hidden), (width, hidden), (hidden, width)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.decoder.layers.{layer}", f"blk.{layer}"
        attention = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj",
                     "attn_output": "out_proj"}  # fmt: skip
        entries.append(ones(f"{theirs}.attn_norm.weight"))
        for name, part in attention.items():
            source = f"{ours}.self_attn.{part}.weight"
            entries.append(entry(f"{theirs}.{name}.weight", square, source))
        up, last = f"{ours}.fc1.weight", (neurons - width) * hidden
        entries += [
            ones(f"{theirs}.ffn_norm.weight"),
            entry(f"{theirs}.ffn_gate.weight", wide, up),
            entry(f"{theirs}.ffn_up.weight", wide, up, last),
            entry(f"{theirs}.ffn_down.weight", tall, f"{ours}.fc2.weight"),
        ]
    entries.append(ones("output_norm.weight"))
    if not config.tie_word_embeddings:
        entries.append(entry("output.weight", embedding.shape, "lm_head.weight"))
    return entries


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    for written in (name, name.removeprefix("model.")):  # older checkpoints leave it out
        if tensor := checkpoint.tensors.get(written):
            return tensor
    raise StoreError(f"{checkpoint.folder} has no tensor {name}, which a GGUF needs")


def _head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope_theta(checkpoint: Checkpoint) -> float:
    rope = getattr(checkpoint.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise StoreError(f"{checkpoint.folder}: no GGUF is written of a Llama with {kind} RoPE")
    return float(rope.get("rope_theta", 10000.0))


def _permuted(values: Array, heads: int) -> Array:
    """transformers turns a head's first half against its second; llama.cpp neighbouring rows."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
