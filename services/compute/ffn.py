"""FlashFFN: stands where the model's FFN stood, and multiplies straight from the cache.

An FFN is a sum over neurons, so parts may come in any order and any split:

    plain    out = Σ act(up·x + b) · down + b_down
    gated    out = Σ act(gate·x + b) · (up·x + b) · down + b_down

A neuron that does not fire is skipped before its other parts are touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.model.act import make_act
from common.model.activation import Activation
from common.plan import part_bundles
from common.store.geometry import Geometry
from services.compute.blocks import Tokens
from services.compute.pipeline import Indices, Part, Pipeline
from services.compute.products import Sums


class FlashFFN(nn.Module):
    """The FFN of one layer. Its weights are not here: `pipeline` says where they lie."""

    def __init__(
        self,
        layer: int,
        geometry: Geometry,
        activation: Activation,
        biases: Mapping[str, npt.NDArray[np.float32]],
        pipeline: Pipeline,
    ):
        super().__init__()
        self.layer = layer
        self.hidden = geometry.hidden
        self.chunk = part_bundles(geometry)
        self.first = geometry.parts[0]  # the part that says whether a neuron fires
        self.act = make_act(activation)
        # Not buffers: they are the store's, float32, and no part of the model's state dict.
        self.biases = biases
        self.pipeline = pipeline

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN's output for `x` [..., hidden], in x's shape and dtype; summed in float32."""
        rows = x.reshape(-1, self.hidden)
        if len(rows) == 1:
            out = self._one(rows)
        elif len(rows) <= self.pipeline.rows.few:
            out = self._few(rows)
        else:
            out = self._block(rows)
        if "down" in self.biases:
            out += torch.from_numpy(self.biases["down"])
        return out.to(x.dtype).view(x.shape)

    def _one(self, rows: torch.Tensor) -> torch.Tensor:
        wide, out = rows[0].float(), torch.zeros(self.hidden)
        for part in self.pipeline.parts(self.layer, rows):
            self._add_one(out, wide, part)
        return out

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        """A few tokens, of one request or of several: the union of their neurons, for each of
        them."""
        wide, out = rows.float(), torch.zeros(len(rows), self.hidden)
        for part in self.pipeline.parts(self.layer, rows):
            self._add_few(out, wide, part)
        return out

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

    def _add_one(self, out: torch.Tensor, x: torch.Tensor, part: Part) -> None:
        """Adds a part's share for one token, straight from the cache."""
        first, rows = self.first, self.pipeline.rows
        z = rows.dot(first, part.slots, x)
        values = self.act(self._bias(z, first, part.ids)).numpy()
        fires = np.flatnonzero(values)
        self.pipeline.fired(part, len(fires))
        if not len(fires):
            return
        h, slots = torch.from_numpy(values[fires]), part.slots[fires]
        if first == "gate":
            h *= self._bias(rows.dot("up", slots, x), "up", part.ids[fires])
        rows.add("down", slots, h, out)

    def _add_few(self, out: torch.Tensor, xs: torch.Tensor, part: Part) -> None:
        """Adds a part's share for a few tokens, `xs` [tokens, hidden]. The other rows of a neuron
        are touched if it fires for any of them, once for all."""
        first, rows = self.first, self.pipeline.rows
        h = self.act(self._bias(rows.dot_many(first, part.slots, xs), first, part.ids))
        fires = np.flatnonzero(h.numpy().any(axis=0))
        self.pipeline.fired(part, len(fires))
        if not len(fires):
            return
        h, slots = torch.from_numpy(h.numpy()[:, fires]), part.slots[fires]
        if first == "gate":
            h *= self._bias(rows.dot_many("up", slots, xs), "up", part.ids[fires])
        rows.add_many("down", slots, h, out)

    def _add_block(self, sums: Sums, tokens: Tokens, ids: Indices, slots: Indices) -> None:
        """Adds the share of some neurons for many tokens; no more of them than the plan has room
        for."""
        rows, h = self.pipeline.rows, torch.empty(len(ids), len(tokens))

        def activate(first: int, end: int, z: torch.Tensor) -> None:
            h[first:end] = self.act(self._bias(z.T, self.first, ids[first:end]).T)

        rows.dot_block(self.first, slots, tokens, activate)
        if self.first == "gate":

            def scale(first: int, end: int, z: torch.Tensor) -> None:
                h[first:end] *= self._bias(z.T, "up", ids[first:end]).T

            rows.dot_block("up", slots, tokens, scale)
        rows.add_block("down", slots, h, sums)
