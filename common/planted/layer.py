"""The plant: how one layer's weights are made so that it behaves as OPT 6.7B was published to.

A layer is made from what reaches it: a few streams of tokens run through the finished layers, and
each layer's gains are set by what they look like there. x is the FFN's input, of variance 1.

**What fires, and who knows.** The pre-activation of neuron i is

    z_i = SIGNAL × (A_i · P x) + √(1 - SIGNAL²) × (noise_i · x) + bias_i

P [rank, hidden] has random signs, A [neurons, rank] normal numbers; both sums have variance 1. The
up (or gate) row of the neuron is all of that but the bias. The planted predictor knows A, P and
bias and not the noise: SIGNAL is how well it can do. 0.865 gives 5 % false negatives with 7 % false
positives at the published rates.

**How often.** bias_i = shift + RATE_SPREAD × a normal number: some neurons fire for every second
token of a context, most for almost none. The shift is set so that the layer fires at its rate:
`fire_rate`, 1.6 % in the first layer to 5.4 % in the last, 3.3 % on average.

**How much tokens share.** x is SLOW_SHARE context and the rest fresh. Context comes by attention
that looks back by distance alone (common/planted/recency.py), half of the heads over 5 tokens and
half over 16, at values made of the token's own numbers: so it drifts as tokens come and go, at
every depth at the same pace. Layer 0's attention brings all of it. In later layers the FFN adds
FFN_SHARE of the stream's power, fresher than x is, and attention as much context as keeps the
correlation of tokens 1 to LAGS apart where it was. Neighbouring layers' inputs so differ by a few
percent, as in real models: that is what look-ahead has to guess.

Numbers in this file were chosen by simulating named neurons and replaying them through the caches'
policies, until 24 % of the FFN were named in five tokens and 2.4 % were new in each.

**Look-ahead** applies the same A to a guess of P x: a weighted sum of P x(L-1) of this token, of
the token before, and of P x(L) of the token before, by least squares over the streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from common.learn.curve import Curve, curve_of
from common.planted import recency
from common.planted.families import QUIET, Plant
from common.planted.noise import noise_blocks, normal, signs

SIGNAL = 0.865
RATE_SPREAD = 0.8
SLOW_SHARE = 0.47
LENGTHS = (5.0, 16.0)  # tokens that the heads look back, by turns
FFN_SHARE = 0.05
LAGS = 8
SETTLED = 48  # tokens of a stream after which its context is as full as it gets
RANK_MAX = 128
_ATTENTION_SHARE_MIN = 0.005
_LOOK_NOISE = 0.02  # of queries and keys, per number, beside their look back: scores shift by 0.1
# Layers' rates by depth, from first to last: the paper gives the first, the middle and the last,
# and 3.3 % in all.
_FIRE_RATES = (0.016, 0.025, 0.027, 0.045, 0.054)


def fire_rate(layer: int, layers: int) -> float:
    """Share of a layer's neurons that fire for a token."""
    place = layer / max(layers - 1, 1) * (len(_FIRE_RATES) - 1)
    low = min(int(place), len(_FIRE_RATES) - 2)
    return _FIRE_RATES[low] + (place - low) * (_FIRE_RATES[low + 1] - _FIRE_RATES[low])


def rank_of(hidden: int) -> int:
    return min(RANK_MAX, hidden // 8)


class Sink(Protocol):
    def write(self, name: str, values: torch.Tensor) -> None:
        """The next rows of the tensor `name`."""


@dataclass(frozen=True)
class LayerPlant:
    """What is known of a planted layer. Scores are in standard deviations of the noise in z."""

    fire_rate: float  # as planted
    shift: float  # of the biases
    attention_share: float  # of the stream's power, added by attention
    reuse: float  # correlation of x, 1 to LAGS tokens apart
    ahead: tuple[float, float, float]  # weights of P x(L-1), of that before, of P x(L) before
    p: torch.Tensor  # [rank, hidden]
    a: torch.Tensor  # [neurons, rank]
    bias: torch.Tensor  # [neurons]
    curves: dict[str, Curve]  # "same" and "ahead", over the calibration streams


class Planting:
    """The layers, one after another. `streams` [streams, tokens, hidden] is what enters layer 0."""

    def __init__(self, plant: Plant, seed: int, streams: torch.Tensor, sink: Sink):
        self._plant, self._seed, self._sink = plant, seed, sink
        self._widths = plant.widths
        self._h = streams
        self._before = streams  # the FFN input of the layer before; of layer 0: the embedding
        looks = self._looks(torch.ones(streams.shape[1]))
        self._averaged = [recency.power(look[-1]) for look in looks]
        context = sum(recency.reuse(look[-1], LAGS) for look in looks) / len(looks)
        self._context_reuse, self._reuse = context, SLOW_SHARE * context
        # What attention and FFN write: the stream, and quietly its other parts.
        self._written = torch.ones(self._widths.hidden)
        self._written[: self._widths.token] = QUIET
        self._written[-plant.marked :] = QUIET
        self._stream_power = float(self._written.square().sum())

    def layer(self, layer: int) -> LayerPlant:
        """Makes and writes a layer, and runs the streams through it."""
        for name, values in self._plant.constants(layer):
            self._sink.write(name, values)
        attention_share = self._plant_attention(layer)
        return self._plant_ffn(layer, attention_share)

    def _looks(self, loudness: torch.Tensor) -> list[torch.Tensor]:
        """The heads' attention, per length [..., tokens, tokens]; `loudness` is of their input."""
        frequencies = self._plant.frequencies
        return [recency.weights(frequencies, length, loudness) for length in LENGTHS]

    def _name(self, layer: int, module: str) -> str:
        return f"{self._plant.prefix}.{layer}.{module}.weight"

    def _power(self, h: torch.Tensor) -> float:
        """Mean square of settled tokens' numbers, without the mark."""
        return float(h[:, SETTLED:, : -self._plant.marked].square().mean())

    def _reuse_of(self, h: torch.Tensor) -> float:
        settled = h[:, SETTLED:, : -self._plant.marked]
        products = [(settled[:, :-n] * settled[:, n:]).mean() for n in range(1, LAGS + 1)]
        return float(sum(products)) / LAGS / self._power(h)

    def _plant_attention(self, layer: int) -> float:
        """Returns the share of power that attention adds."""
        widths, names = self._widths, self._plant.attention
        x = self._plant.norm(self._h)
        loudness = self._plant.loudness(x)
        loud = float(loudness[:, SETTLED:].mean())
        for name, heads in zip(names[:2], (widths.heads, widths.kv_heads), strict=True):
            self._plant_look(self._name(layer, name), heads, heads // widths.kv_heads, loud)
        values = self._plant_values(self._name(layer, names[2]), x, self._looks(loudness / loud))
        here, target = self._reuse_of(self._h), self._reuse
        # So much context that, with what is there, reuse is on target again.
        share = max((target - here) / (self._context_reuse - target), _ATTENTION_SHARE_MIN)
        power = share * self._power(self._h) * (widths.hidden - self._plant.marked)
        heard = float(values[:, SETTLED:].square().sum(2).mean())
        gain = math.sqrt(power / self._stream_power / heard)
        self._h = self._h + self._write(self._name(layer, names[3]), values, gain)
        return share

    def _plant_look(self, name: str, heads: int, group: int, loudness: float) -> None:
        """Queries or keys: each head looks back its length. `group` heads share a key."""
        widths, marked = self._widths, self._plant.marked
        patterns = [
            self._plant.look_back(recency.gains(self._plant.frequencies, length), loudness)
            for length in LENGTHS
        ]
        wanted = torch.cat([patterns[head // group % len(LENGTHS)] for head in range(heads)])
        scale = _LOOK_NOISE * widths.head**0.25 / math.sqrt(widths.hidden)
        for rows, block in noise_blocks(self._seed, name, heads * widths.head, widths.hidden):
            block *= scale
            block[:, -marked:] += wanted[rows]
            self._sink.write(name, block)

    def _plant_values(self, name: str, x: torch.Tensor, looks: list[torch.Tensor]) -> torch.Tensor:
        """Returns what the heads hear, [streams, tokens, heads × head], about of variance 1."""
        widths = self._widths
        loudness = math.sqrt(float(x[:, SETTLED:, : widths.token].square().mean()) * widths.token)
        # A look over more tokens averages more away.
        scales = [1 / loudness / math.sqrt(averaged) for averaged in self._averaged]
        scale = torch.tensor([scales[head % len(LENGTHS)] for head in range(widths.kv_heads)])
        scale = scale.repeat_interleave(widths.head)[:, None]
        columns = torch.full((widths.hidden,), QUIET)
        columns[: widths.token] = 1.0
        heard = torch.empty(*x.shape[:2], widths.kv_heads * widths.head)
        for rows, block in noise_blocks(self._seed, name, len(scale), widths.hidden):
            block *= scale[rows]
            block *= columns
            self._sink.write(name, block)
            heard[..., rows] = x @ block.T
        heads = heard.unflatten(2, (widths.kv_heads, widths.head))
        mixed = torch.empty_like(heads)
        for number, look in enumerate(looks):
            own = heads[:, :, number :: len(looks)]
            mixed[:, :, number :: len(looks)] = torch.einsum("bts,bshd->bthd", look, own)
        return mixed.repeat_interleave(widths.heads // widths.kv_heads, 2).flatten(2)

    def _write(self, name: str, values: torch.Tensor, gain: float) -> torch.Tensor:
        """A matrix that adds [streams, tokens, width] to the stream. Returns what it adds."""
        added = torch.empty_like(self._h)
        for rows, block in noise_blocks(self._seed, name, self._widths.hidden, values.shape[2]):
            block *= (gain * self._written[rows])[:, None]
            self._sink.write(name, block)
            added[..., rows] = values @ block.T
        return added

    def _plant_ffn(self, layer: int, attention_share: float) -> LayerPlant:
        widths, plant = self._widths, self._plant
        x = plant.norm(self._h)
        rate = fire_rate(layer, widths.layers)
        power = self._power(x)
        first, p, a, z = self._make_first(layer, x, math.sqrt(power))
        bias = RATE_SPREAD * normal(self._seed, f"{layer}.rates", widths.neurons)
        z += bias
        settled = z[:, SETTLED:].flatten()
        place = round((1 - rate) * len(settled))
        shift = round(-float(settled.kthvalue(place).values), 4)
        bias += shift
        z += shift
        plant.set_biases(first, bias, float(plant.loudness(x[:, SETTLED:]).mean()))
        self._sink.write(self._name(layer, plant.ffn[0]), first)
        biases = plant.biases(layer)
        if biases is not None:
            self._sink.write(biases[0], bias)
        active = z.relu()
        if len(plant.ffn) == 3:
            active *= self._make_gated(self._name(layer, plant.ffn[1]), x)
        wanted = FFN_SHARE * self._power(self._h) * (widths.hidden - plant.marked)
        heard = float(active[:, SETTLED:].square().sum(2).mean())
        gain = math.sqrt(wanted / self._stream_power / heard)
        added = self._write(self._name(layer, plant.ffn[-1]), active, gain)
        if biases is not None:
            # What fires adds something on average, and no token would get rid of it again.
            mean = added[:, SETTLED:].mean((0, 1)).half().float()
            self._sink.write(biases[1], -mean)
            added -= mean
        ahead, curves = self._predict(x, p, a, bias, z > 0)
        self._h = self._h + added
        self._before = x
        scale = 1 / math.sqrt(1 - SIGNAL**2)
        return LayerPlant(
            rate, shift, attention_share, self._reuse_of(x), ahead,
            p, a * scale, bias * scale, curves,
        )  # fmt: skip

    def _make_first(
        self, layer: int, x: torch.Tensor, loudness: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The matrix that says what fires, float16 [neurons, hidden] and without biases, its P and
        A (with all factors in it), and z [streams, tokens, neurons] without biases."""
        widths, marked, seed = self._widths, self._plant.marked, self._seed
        rank, unmarked = rank_of(widths.hidden), widths.hidden - marked
        p = signs(seed, f"{layer}.p", rank, widths.hidden) / math.sqrt(unmarked)
        p[:, -marked:] = 0
        a = normal(seed, f"{layer}.a", widths.neurons, rank)
        a *= SIGNAL / loudness / math.sqrt(rank)
        scale = math.sqrt((1 - SIGNAL**2) / unmarked) / loudness
        columns = torch.full((widths.hidden,), scale)
        columns[-marked:] *= QUIET
        name = self._name(layer, self._plant.ffn[0])
        first = torch.empty(widths.neurons, widths.hidden, dtype=torch.float16)
        z = torch.empty(*x.shape[:2], widths.neurons)
        for rows, block in noise_blocks(seed, name, widths.neurons, widths.hidden):
            block *= columns
            block.addmm_(a[rows], p)
            first[rows] = block
            z[..., rows] = x @ block.T
        return first, p, a, z

    def _make_gated(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The matrix beside a gate: noise. Returns its product with x."""
        widths = self._widths
        made = torch.empty(*x.shape[:2], widths.neurons)
        for rows, block in noise_blocks(self._seed, name, widths.neurons, widths.hidden):
            block *= 1 / math.sqrt(widths.hidden)
            self._sink.write(name, block)
            made[..., rows] = x @ block.T
        return made

    def _predict(
        self,
        x: torch.Tensor,
        p: torch.Tensor,
        a: torch.Tensor,
        bias: torch.Tensor,
        fired: torch.Tensor,
    ) -> tuple[tuple[float, float, float], dict[str, Curve]]:
        """Look-ahead's weights, and both predictors' curves over the settled tokens."""
        own, before = x @ p.T, self._before @ p.T
        known = torch.stack([before[:, 1:], before[:, :-1], own[:, :-1]], dim=-1)[:, SETTLED - 1 :]
        wanted = own[:, SETTLED:]
        columns = known.flatten(0, -2).double()
        solved = torch.linalg.lstsq(columns, wanted.flatten().double()[:, None]).solution
        now, then, own_then = (round(float(weight), 5) for weight in solved[:, 0])
        guess = known @ torch.tensor([now, then, own_then])
        scale = 1 / math.sqrt(1 - SIGNAL**2)
        curves = {}
        for kind, latent in (("same", wanted), ("ahead", guess)):
            scores = (latent @ a.T + bias) * scale
            curves[kind] = curve_of(
                scores.flatten(0, 1).numpy(), fired[:, SETTLED:].flatten(0, 1).numpy()
            )
        return (now, then, own_then), curves
