"""FlashFFN: stands where the model's FFN stood, and multiplies straight from the cache.

An FFN is a sum over neurons, so parts may come in any order and any split:

    plain    out = Σ act(up·x + b) · down + b_down
    gated    out = Σ act(gate·x + b) · (up·x + b) · down + b_down

A neuron that does not fire is skipped before its other parts are touched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from common.model.act import make_act
from common.model.activation import Activation
from common.store.geometry import Geometry
from services.compute.pipeline import Part, Pipeline


class FlashFFN(nn.Module):
    """The FFN of one layer. Its weights are not here: `pipeline` says where they lie."""

    def __init__(
        self,
        layer: int,
        geometry: Geometry,
        activation: Activation,
        biases: dict[str, torch.Tensor],
        pipeline: Pipeline,
    ):
        super().__init__()
        self.layer = layer
        self.hidden = geometry.hidden
        self.part_index = {name: i for i, name in enumerate(geometry.parts)}
        self.act = make_act(activation)
        # Not buffers: they are the store's, float32, and no part of the model's state dict.
        self.biases = biases
        self.pipeline = pipeline

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN's output for `x` [..., hidden], in x's shape and dtype; summed in float32."""
        rows = x.reshape(-1, self.hidden)
        out = torch.zeros(len(rows), self.hidden)
        for part in self.pipeline.parts(self.layer, rows):
            if len(rows) == 1:
                self._add_one(out[0], rows[0], part)
            else:
                self._add_block(out, rows.float(), part)
        if "down" in self.biases:
            out += self.biases["down"]
        return out.to(x.dtype).view(x.shape)

    def _gather(self, name: str, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One part of the bundles in `slots`, [count, hidden]. Gathered before it is used: in
        place, where rows are not contiguous, embedding_bag is several times slower."""
        start = self.part_index[name] * self.hidden
        rows = self.pipeline.cache[:, start : start + self.hidden].index_select(0, slots)
        return rows.to(dtype)

    def _bias(self, z: torch.Tensor, name: str, ids: torch.Tensor) -> torch.Tensor:
        return z + self.biases[name][ids] if name in self.biases else z

    def _add_one(self, out: torch.Tensor, x: torch.Tensor, part: Part) -> None:
        """Adds a part's share for one token. Products over rows (`mv`, `embedding_bag`): in half
        precision a vector times a matrix runs at a hundredth of the memory's speed."""
        first = "gate" if "gate" in self.part_index else "up"
        z = torch.mv(self._gather(first, part.slots, x.dtype), x).float()
        h = self.act(self._bias(z, first, part.ids))
        fires = h.nonzero().squeeze(1)
        self.pipeline.fired(part, len(fires))
        if not len(fires):
            return
        h, ids, slots = h[fires], part.ids[fires], part.slots[fires]
        if first == "gate":
            up = torch.mv(self._gather("up", slots, x.dtype), x).float()
            h = h * self._bias(up, "up", ids)
        down = self._gather("down", slots, x.dtype)
        every, start = torch.arange(len(down)), torch.zeros(1, dtype=torch.int64)
        # h is float32, and may be more than half precision can hold; all of it may be 0.
        scale = h.abs().max().clamp_min(torch.finfo(h.dtype).tiny)
        weights = (h / scale).to(down.dtype)
        sums = F.embedding_bag(every, down, start, mode="sum", per_sample_weights=weights)
        out += sums[0].float() * scale

    def _add_block(self, out: torch.Tensor, x: torch.Tensor, part: Part) -> None:
        """Adds a part's share for many tokens, in float32: a product of fp16 matrices runs at a
        third of that speed on a CPU."""
        first = "gate" if "gate" in self.part_index else "up"
        z = x @ self._gather(first, part.slots, x.dtype).T
        h = self.act(self._bias(z, first, part.ids))
        if first == "gate":
            up = x @ self._gather("up", part.slots, x.dtype).T
            h = h * self._bias(up, "up", part.ids)
        out.addmm_(h, self._gather("down", part.slots, x.dtype))
