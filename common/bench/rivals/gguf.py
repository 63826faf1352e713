"""A GGUF file (F16, Q8_0, Q4_0) from a checkpoint, for llama.cpp: streamed, some rows at a time.

A Llama keeps its own weights, with the rows of q and k in llama.cpp's order. llama.cpp has no OPT:
that becomes a Llama of the same shape, with as many layers, heads, tokens and FFN bytes, its
matrices filled with the OPT's bytes. What it says means nothing; it is read and multiplied like the
real thing. Neither has a vocabulary: a bench feeds ids. Refuses what llama.cpp would compute
differently without a word: biases, scaled RoPE.

Quantised matrices are those that the package's own quantiser makes. In Q4_0 the head is Q8_0, as
inflash has it in int8 beside int4: its products are the logits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.bench.rivals.program import load
from common.errors import StoreError
from common.model.checkpoint import Checkpoint, open_checkpoint
from common.store.partial import sync_folder
from common.store.tensors import Tensor, to_float32

Array = npt.NDArray[Any]

PACKAGES = {"gguf": "gguf"}
FORMATS = ("f16", "q8_0", "q4_0")
_ROUND = (
    32  # numbers of a quantised block; and of an FFN's width, llama.cpp's kernels like multiples
)
_BLOCK_BYTES = 16 << 20  # of a tensor, as float32, in memory at a time


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    source: Tensor | None  # None: ones
    start: int = 0  # in the source, counted in elements
    heads: int | None = None  # of q and k: their rows are permuted head by head

    @property
    def width(self) -> int:
        """Numbers of a row; a vector is one row."""
        return self.shape[-1]

    def blocks(self) -> Iterator[Array]:
        """Its values in order, float16 or float32 [some rows, width]; of q and k, whole heads."""
        rows = math.prod(self.shape[:-1])
        unit = rows // self.heads if self.heads else 1
        count = max(1, _BLOCK_BYTES // (4 * unit * self.width)) * unit
        for first in range(0, rows, count):
            yield self._read(first, min(count, rows - first), unit)

    def _read(self, first: int, count: int, unit: int) -> Array:
        if self.source is None:
            return np.ones((count, self.width), np.float32)
        source = self.source
        item = source.nbytes // math.prod(source.shape)
        raw = np.empty(count * self.width * item, np.uint8)
        source.read_into(raw.data, (self.start + first * self.width) * item)
        if source.dtype == "float16":
            values: Array = raw.view(np.float16)
        else:
            values = to_float32(raw, source.dtype)
        values = values.reshape(count, self.width)
        return values if self.heads is None else _permuted(values, count // unit)


@dataclass(frozen=True)
class _Written:
    """One tensor as it is written. The package takes it for an array: it asks for `nbytes`, and for
    the bytes, `tofile`."""

    entry: _Entry
    kind: Any  # the package's GGMLQuantizationType
    gguf: Any  # the package

    @property
    def nbytes(self) -> int:
        block, size = self.gguf.GGML_QUANT_SIZES[self.kind]
        return int(math.prod(self.entry.shape) // block * size)

    def tofile(self, file: IO[bytes]) -> None:
        for values in self.entry.blocks():
            self.gguf.quants.quantize(values, self.kind).tofile(file)


def write_gguf(
    folder: Path,
    path: Path,
    number_format: str = "f16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Writes the checkpoint in `folder` as the GGUF file `path`; returns a sentence on what differs
    between the two, which is in the file, too ("general.description").

    A file appears only when it is whole. `progress` is called with bytes written and their total
    after each tensor. `StoreError` for a checkpoint that llama.cpp would not compute as it is, or
    whose rows cannot be quantised as `number_format`, one of FORMATS.
    """
    gguf = load("gguf", PACKAGES)
    checkpoint = open_checkpoint(folder)
    model = checkpoint.config.model_type
    entries = _opt_entries(checkpoint) if model == "opt" else _llama_entries(checkpoint)
    tensors = [_written(gguf, checkpoint, entry, number_format) for entry in entries]
    note = _note(checkpoint) + (f"; weights in {number_format.upper()}" * (number_format != "f16"))
    partial = unfinished_gguf(path)
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        writer.add_description(note)
        _add_config(writer, checkpoint, entries)
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{number_format.upper()}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for one in tensors:
            shape = one.entry.shape
            writer.add_tensor_info(
                one.entry.name, shape, np.dtype(np.float16), one.nbytes, one.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(one.nbytes for one in tensors)
        for one in tensors:
            writer.write_tensor_data(one)
            done += one.nbytes
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


def unfinished_gguf(path: Path) -> Path:
    """Where a GGUF file is written before it is whole: what a killed run left is written over."""
    return path.with_name(path.name + ".partial")


def row_problem(number_format: str, width: int) -> str:
    """Why rows of `width` numbers cannot be quantised as `number_format`; "" if they can be."""
    if number_format == "f16" or width % _ROUND == 0:
        return ""
    return f"{number_format} takes rows of a multiple of {_ROUND} numbers, these have {width:,}"


def _written(gguf: Any, checkpoint: Checkpoint, entry: _Entry, number_format: str) -> _Written:
    """The tensor in its number format."""
    kind = number_format
    if len(entry.shape) == 1:
        kind = "f32"  # llama.cpp's kernels ask for vectors of 32 bits
    elif number_format == "q4_0" and entry.name == _head(checkpoint):
        kind = "q8_0"
    elif problem := row_problem(number_format, entry.width):
        raise StoreError(f"{checkpoint.folder}: {entry.name}: {problem}")
    return _Written(entry, gguf.GGMLQuantizationType[kind.upper()], gguf)


def _head(checkpoint: Checkpoint) -> str:
    """The file's name of the tensor that logits are made with."""
    tied = checkpoint.config.tie_word_embeddings
    return "token_embd.weight" if tied else "output.weight"


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


def _add_config(writer: Any, checkpoint: Checkpoint, entries: list[_Entry]) -> None:
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
