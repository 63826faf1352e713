"""The demo models: what each kind is made of, and the pressure that keeps its FFN sparse.

Owns the table of kinds (settings, size limit, the dtype of the published weights), the building of
transformers' models with an attention that trains fast on a CPU, and the sparsity controller. A
model's neuron fires where the input of its activation function is above 0: OPT's first matrix, or
the gate of Llama's FFN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from scripts.demo_corpus import GatedSettings, Settings


def build_opt(settings: Settings) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=settings.vocab,
            hidden_size=settings.hidden,
            word_embed_proj_dim=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            ffn_dim=settings.ffn,
            max_position_embeddings=settings.context,
            activation_function="relu",
            do_layer_norm_before=True,
            dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def build_llama(settings: Settings) -> PreTrainedModel:
    assert isinstance(settings, GatedSettings)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab,
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            intermediate_size=settings.ffn,
            max_position_embeddings=settings.context,
            hidden_act="relu",
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


@dataclass(frozen=True)
class Kind:
    """A demo model that can be trained. `name` is that of its folder."""

    family: str  # transformers' model_type
    name: str
    settings: Settings
    minutes: float
    dtype: torch.dtype  # of the published weights; training keeps them in float32
    folder_bytes_max: int
    build: Callable[[Settings], PreTrainedModel]
    activation: str  # path of the activation function within a layer


KINDS = {
    kind.family: kind
    for kind in (
        Kind(
            family="opt",
            name="demo",
            settings=Settings(),
            minutes=66.0,
            dtype=torch.float32,
            folder_bytes_max=32_000_000,
            build=build_opt,
            activation="activation_fn",
        ),
        Kind(
            family="llama",
            name="demo-gated",
            settings=GatedSettings(),
            minutes=30.0,
            dtype=torch.float16,
            folder_bytes_max=6_000_000,
            build=build_llama,
            activation="mlp.act_fn",
        ),
    )
}


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole windows, (batch, heads, length, size) -> (batch, length, ...).

    The backward of torch's fused CPU kernel costs a fifth of a step at short lengths, where plain
    bfloat16 products need a fourth of the time.
    """
    length = query.shape[2]
    if query.dtype != value.dtype:  # rotary positions leave queries and keys in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if query.shape[1] != key.shape[1]:  # a key head serves several query heads
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if length > 256 or query.dtype != torch.bfloat16:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    # autocast would make the softmax float32, and its copies cost more than the products
    with torch.autocast("cpu", enabled=False):
        future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
        q, k, v = (x.flatten(0, 1) for x in (query * scaling, key, value))
        weights = torch.softmax(torch.baddbmm(future, q, k.transpose(1, 2)), -1)
        out = torch.bmm(weights, v).view(query.shape)
    return out.transpose(1, 2).contiguous(), None


def build_model(kind: Kind) -> Any:
    torch.manual_seed(kind.settings.seed)
    model = kind.build(kind.settings)
    AttentionInterface.register("windows", attend)
    AttentionMaskInterface.register("windows", lambda *_, **__: None)
    model.set_attn_implementation("windows")
    return model


def layers_of(model: Any) -> torch.nn.ModuleList:
    layers: torch.nn.ModuleList = model.get_decoder().layers
    return layers


class Sparsity:
    """Sees every layer's activations; gives the penalty that keeps them sparse, and the counts.

    The penalty is mean(h) / rms(h) with the rms held constant: it presses on every neuron that
    fires, whatever the layer's scale, so a layer cannot escape it by shrinking its activations.
    Each layer's coefficient grows while the layer is more active than its target, else shrinks
    (integral), and the square of active / target scales it (proportional): without the second a
    layer swings far below its target, and neurons die there.
    """

    def __init__(self, model: Any, kind: Kind) -> None:
        self.settings = settings = kind.settings
        self.coefs = [0.005] * settings.layers
        self.active = [0.5] * settings.layers  # running mean
        self.targets = [0.3] * settings.layers
        self.fired = torch.zeros(settings.layers, settings.ffn)  # counts of evaluation
        self.penalties: list[torch.Tensor] = []
        for layer, block in enumerate(layers_of(model)):
            block.get_submodule(kind.activation).register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor], h: torch.Tensor) -> None:
            if not module.training:
                self.fired[layer] += (inputs[0] > 0).reshape(-1, h.shape[-1]).sum(0)
                return
            rms = torch.linalg.vector_norm(h.detach(), dtype=torch.float32) / math.sqrt(h.numel())
            penalty = h.mean(dtype=torch.float32) / (rms + 1e-6)
            scale = min(2.0, self.active[layer] / self.targets[layer]) ** 2
            self.penalties.append(self.coefs[layer] * scale * penalty)
            sample = h.detach()[:2]  # counting all of it costs 7 % of a step
            share = torch.count_nonzero(sample).item() / sample.numel()
            self.active[layer] += 0.1 * (share - self.active[layer])

        return see

    def take_penalty(self) -> torch.Tensor:
        total = torch.stack(self.penalties).sum()
        self.penalties.clear()
        return total

    def adapt(self, progress: float) -> None:
        """The target falls from 30 % over the first fifth: pressure too early kills neurons."""
        ramp = min(1.0, progress / 0.2)
        for layer, active in enumerate(self.active):
            self.targets[layer] = 0.3 * (self.settings.target(layer) / 0.3) ** ramp
            push = max(-1.0, min(1.0, active / self.targets[layer] - 1.0))
            self.coefs[layer] = max(1e-4, min(3.0, self.coefs[layer] * math.exp(0.01 * push)))
