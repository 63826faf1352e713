"""What differs between families in a plant: names, the mark that heads and biases read, the norm.

The residual stream is divided, in this order:

    token    hidden / 4       written by the embedding alone: attention's values are made of these
    stream                    written by the embedding, attention and FFN
    marked   a few, at the    positions as cosines and sines (OPT), or a constant (Llama, whose
             end              rotary embedding makes positions of it)

What a matrix should not read or write is QUIET noise in it, not zero: a drive may compress zeros,
and a benchmark on them would read faster than on a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

QUIET = 1 / 64  # of the noise elsewhere
LOGIT_STD = 2.0  # of the last layer's output times the head: sampled text wanders
_POSITION_PAIRS_MAX = 24
_CONSTANT = 4.0  # Llama's mark, where the embedding's other numbers have variance 1


@dataclass(frozen=True)
class Widths:
    """The sizes that a plant needs, from transformers' configuration."""

    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def token(self) -> int:
        return self.hidden // 4


def widths_of(config: Any) -> Widths:
    heads = config.num_attention_heads
    neurons = config.ffn_dim if config.model_type == "opt" else config.intermediate_size
    return Widths(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        neurons=neurons,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
    )


class Plant(Protocol):
    """One family's way to do what every plant does. Tensors are float32."""

    widths: Widths
    marked: int
    frequencies: torch.Tensor  # of positions, rad per token
    embedding: str  # names in the state dict
    head: str | None
    final_norm: str
    ffn: tuple[str, ...]  # first the matrix whose sign says what fires, last the one that adds
    attention: tuple[str, ...]  # query, key, value, output
    prefix: str

    def mark(self, rows: torch.Tensor) -> None:
        """Makes of noise the embedding's rows [some, hidden]: writes the mark, or leaves room."""

    def positions(self) -> tuple[str, torch.Tensor] | None:
        """Name and table [rows, hidden] of learned positions, and of none None."""

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        """What enters layer 0 for tokens with these embeddings [streams, tokens, hidden]."""

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        """The norm of h [..., hidden], its weight 1."""

    def constants(self, layer: int) -> Sequence[tuple[str, torch.Tensor]]:
        """Norms and biases of a layer that the plant leaves alone."""

    def loudness(self, x: torch.Tensor) -> torch.Tensor:
        """How loud the mark is [...] in x [..., hidden], which a norm made."""

    def look_back(self, gains: torch.Tensor, loudness: float) -> torch.Tensor:
        """[head, marked]: a query's or a key's weights on a mark so loud; `gains` are over
        positions."""

    def set_biases(self, first: torch.Tensor, biases: torch.Tensor, loudness: float) -> None:
        """Puts biases [neurons] into the first FFN matrix [neurons, hidden], in a family that has
        no biases: they are heard from a mark so loud."""

    def biases(self, layer: int) -> tuple[str, str] | None:
        """The tensors of the FFN's biases, the first matrix's and the last one's; None where the
        family has none, and `set_biases` put the first."""


def plant_of(config: Any) -> Plant:
    """The plant of a configuration that `config_of` made."""
    return OptPlant(config) if config.model_type == "opt" else LlamaPlant(config)


class OptPlant:
    """LayerNorm, learned positions, biases everywhere, the head tied unless the shape says no."""

    embedding = "model.decoder.embed_tokens.weight"
    final_norm = "model.decoder.final_layer_norm.weight"
    prefix = "model.decoder.layers"
    attention: tuple[str, ...] = tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out"))
    ffn: tuple[str, ...] = ("fc1", "fc2")

    def __init__(self, config: Any):
        self.widths = widths = widths_of(config)
        self.head = None if config.tie_word_embeddings else "lm_head.weight"
        pairs = min(_POSITION_PAIRS_MAX, widths.head // 2, widths.hidden // 16)
        self.marked = 2 * pairs
        self._context = config.max_position_embeddings
        # From one radian per token to a period of four contexts: no distance comes back.
        low = math.log(math.pi / 2 / self._context)
        self.frequencies = torch.linspace(0, low, pairs, dtype=torch.float64).exp().float()

    def mark(self, rows: torch.Tensor) -> None:
        rows[:, -self.marked :] *= QUIET  # the table of positions writes it

    def positions(self) -> tuple[str, torch.Tensor]:
        offset = 2  # of OPT's table: positions begin at its third row
        table = torch.zeros(self._context + offset, self.widths.hidden)
        table[offset:, -self.marked :] = self._waves(self._context)
        return "model.decoder.embed_positions.weight", table

    def _waves(self, tokens: int) -> torch.Tensor:
        """[tokens, marked]: cosine and sine by turns, of variance 1."""
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * self.frequencies.double()
        waves = torch.stack((angles.cos(), angles.sin()), dim=2).flatten(1)
        return (waves * math.sqrt(2)).float()

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + F.pad(self._waves(rows.shape[1]), (rows.shape[2] - self.marked, 0))

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-5)

    def constants(self, layer: int) -> Sequence[tuple[str, torch.Tensor]]:
        hidden, here = self.widths.hidden, f"{self.prefix}.{layer}"
        norms = [f"{here}.{name}_layer_norm" for name in ("self_attn", "final")]
        biased = [f"{here}.{name}" for name in self.attention]
        return [
            *((f"{name}.weight", torch.ones(hidden)) for name in norms),
            *((f"{name}.bias", torch.zeros(hidden)) for name in (*norms, *biased)),
        ]

    def loudness(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x[..., -self.marked :].square().mean(-1)).sqrt()  # cosine² + sine²

    def look_back(self, gains: torch.Tensor, loudness: float) -> torch.Tensor:
        sides = (gains * math.sqrt(self.widths.head)).sqrt() / loudness
        wanted = torch.zeros(self.widths.head, self.marked)
        wanted.diagonal().copy_(sides.repeat_interleave(2))
        return wanted

    def set_biases(self, first: torch.Tensor, biases: torch.Tensor, loudness: float) -> None: ...

    def biases(self, layer: int) -> tuple[str, str]:
        up, down = (f"{self.prefix}.{layer}.{name}.bias" for name in self.ffn)
        return up, down


class LlamaPlant:
    """RMSNorm, rotary positions, a gate, and no biases: one number of the stream is constant."""

    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    prefix = "model.layers"
    attention: tuple[str, ...] = tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "o"))
    ffn: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    marked = 1

    def __init__(self, config: Any):
        self.widths = widths_of(config)
        self.head = None if config.tie_word_embeddings else "lm_head.weight"
        self._eps = config.rms_norm_eps
        steps = torch.arange(0, self.widths.head, 2) / self.widths.head
        self.frequencies = config.rope_parameters["rope_theta"] ** -steps

    def mark(self, rows: torch.Tensor) -> None:
        rows[:, -1] = _CONSTANT

    def positions(self) -> None:
        return None

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(h, h.shape[-1:], eps=self._eps)

    def constants(self, layer: int) -> Sequence[tuple[str, torch.Tensor]]:
        names = ("input_layernorm", "post_attention_layernorm")
        ones = torch.ones(self.widths.hidden)
        return [(f"{self.prefix}.{layer}.{name}.weight", ones) for name in names]

    def loudness(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., -1]

    def look_back(self, gains: torch.Tensor, loudness: float) -> torch.Tensor:
        wanted = torch.zeros(self.widths.head, 1)
        # Rotary pairs are a number of the head's first half and the one as far into its second.
        wanted[: len(gains), 0] = (gains * math.sqrt(self.widths.head)).sqrt() / loudness
        return wanted

    def set_biases(self, first: torch.Tensor, biases: torch.Tensor, loudness: float) -> None:
        first[:, -1] = biases / loudness

    def biases(self, layer: int) -> None:
        return None
