"""FlashFFN: stands where the model's FFN stood, and multiplies straight from the cache.

An FFN is a sum over neurons, so parts may come in any order and any split:

    plain    out = Σ act(up·x + b) · down + b_down
    gated    out = Σ act(gate·x + b) · (up·x + b) · down + b_down

A neuron that does not fire is skipped before its other parts are touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from common.firing import fire, scale
from common.model.act import make_act
from common.model.activation import Activation
from common.packed import Floats, Vectors
from common.plan import part_bundles
from common.store.geometry import Geometry
from services.compute.blocks import Tokens
from services.compute.pipeline import Indices, Part, Pipeline
from services.compute.products import Sums

NONE = np.empty(0, np.float32)  # no biases


class FlashFFN(nn.Module):
    """The FFN of one layer. Its weights are not here: `pipeline` says where they lie."""

    def __init__(
        self,
        layer: int,
        geometry: Geometry,
        activation: Activation,
        biases: Mapping[str, Floats],
        pipeline: Pipeline,
    ):
        super().__init__()
        self.layer = layer
        self.hidden = geometry.hidden
        self.chunk = part_bundles(geometry)
        self.first = geometry.parts[0]  # the part that says whether a neuron fires
        self.activation = activation
        self.act = make_act(activation)
        # Not buffers: they are the store's, float32, and no part of the model's state dict.
        self.biases = biases
        self.pipeline = pipeline

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN's output for `x` [..., hidden], in x's shape and dtype; summed in float32."""
        rows = x.reshape(-1, self.hidden)
        out = self._few(rows) if len(rows) <= self.pipeline.rows.few else self._block(rows)
        if "down" in self.biases:
            out += torch.from_numpy(self.biases["down"])
        return out.to(x.dtype).view(x.shape)

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        """A few tokens, of one request or of several: the union of their neurons, for each of
        them."""
        out, vectors = np.zeros((len(rows), self.hidden), np.float32), None
        for part in self.pipeline.parts(self.layer, rows):
            vectors = vectors or self.pipeline.rows.vectors(rows.float())
            self._add_few(out, vectors, part)
        return torch.from_numpy(out)

    def _block(self, rows: torch.Tensor) -> torch.Tensor:
        cached = self.pipeline.rows
        tokens, sums = cached.tokens(rows), cached.sums(len(rows), self.hidden)
        for part in self.pipeline.parts(self.layer, rows):
            for first in range(0, len(part.ids), self.chunk):
                some = slice(first, first + self.chunk)
                self._add_block(sums, tokens, part.ids[some], part.slots[some])
        return sums.total()

    def _bias(self, z: torch.Tensor, name: str, ids: Indices) -> torch.Tensor:
        """Of neurons `ids`, the last dimension of `z`."""
        if name not in self.biases:
            return z
        return z.add_(torch.from_numpy(self.biases[name][ids]))

    def _add_few(self, out: Floats, vectors: Vectors, part: Part) -> None:
        """Adds a part's share for a few tokens, straight from the cache. The other rows of a neuron
        are touched if it fires for any of them, once for all."""
        first, rows, act = self.first, self.pipeline.rows, self.activation
        z = rows.dot(first, part.slots, vectors)
        ids, slots, h = fire(
            z, len(out), self._biases(first), part.ids, part.slots, act.threshold, act.squared
        )
        self.pipeline.fired(part, len(ids))
        if not len(ids):
            return
        if first == "gate":
            scale(h, rows.dot("up", slots, vectors), self._biases("up"), ids)
        rows.add("down", slots, h, out)

    def _biases(self, name: str) -> Floats:
        return self.biases.get(name, NONE)

    def _add_block(self, sums: Sums, tokens: Tokens, ids: Indices, slots: Indices) -> None:
        """Adds the share of some neurons for many tokens; no more of them than the plan has room
        for."""
        rows, h = self.pipeline.rows, torch.empty(len(ids), len(tokens))

        def activate(first: int, end: int, z: torch.Tensor) -> None:
            h[first:end] = self.act(self._bias(z.T, self.first, ids[first:end]).T)

        rows.dot_block(self.first, slots, tokens, activate)
        if self.first == "gate":

            def gate(first: int, end: int, z: torch.Tensor) -> None:
                h[first:end] *= self._bias(z.T, "up", ids[first:end]).T

            rows.dot_block("up", slots, tokens, gate)
        rows.add_block("down", slots, h, sums)
