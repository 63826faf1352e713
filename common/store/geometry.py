"""The shape of a store's bundles: what every process needs to find a neuron's weights.

A bundle is all weights of one neuron, part after part, each `hidden` numbers long:

    plain FFN   up row ‖ down column            gated FFN   gate row ‖ up row ‖ down column

In the file of layer l, bundle i starts at byte i × stride_bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.limits import ALIGN_BYTES

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# What a checkpoint of each number format is computed in. bfloat16 has too few digits: logits of a
# model computed in it are 1 to 5 % off (docs/measurements.md).
COMPUTE_DTYPES = {"float16": "float16", "bfloat16": "float32", "float32": "float32"}
PARTS = {False: ("up", "down"), True: ("gate", "up", "down")}


@dataclass(frozen=True)
class Geometry:
    """Counts, and bytes that follow from them. One FFN shape for all layers of a model."""

    layers: int
    neurons: int  # per layer
    hidden: int  # length of a row
    gated: bool
    dtype: str  # a key of DTYPE_BYTES

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.gated]

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def compute_dtype(self) -> str:
        """Number format of activations, KV cache and resident weights in memory."""
        return COMPUTE_DTYPES[self.dtype]

    @property
    def bundle_bytes(self) -> int:
        return len(self.parts) * self.hidden * self.item_bytes

    @property
    def stride_bytes(self) -> int:
        """Bytes from one bundle to the next: a multiple of ALIGN_BYTES, so any can be read
        directly."""
        return -(-self.bundle_bytes // ALIGN_BYTES) * ALIGN_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.neurons * self.stride_bytes

    @property
    def ffn_bytes(self) -> int:
        """Bytes of all bundle files: what a cache of 100 % takes."""
        return self.layers * self.layer_bytes
