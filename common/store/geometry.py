"""The shape of a store's bundles: what every process needs to find a neuron's weights.

A bundle is all weights of one neuron, part after part, each `hidden` numbers long:

    plain FFN   up row ‖ down column            gated FFN   gate row ‖ up row ‖ down column

In the file of layer l, bundle i starts at byte i × stride_bytes. Rows are numbers as the checkpoint
has them, or packed ones (common/packed.py), whose scales lie within the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.limits import ALIGN_BYTES

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# What a checkpoint of each number format is computed in. bfloat16 has too few digits: logits of a
# model computed in it are 1 to 5 % off (docs/measurements.md).
COMPUTE_DTYPES = {"float16": "float16", "bfloat16": "float32", "float32": "float32"}
PACKED = ("int8", "int4")
GROUP = 32  # numbers of an int4 row that share a scale and a minimum
SCALED = 16  # numbers of an int8 row whose lowest bits are its scale
PARTS = {False: ("up", "down"), True: ("gate", "up", "down")}


@dataclass(frozen=True)
class Geometry:
    """Counts, and bytes that follow from them. One FFN shape for all layers of a model."""

    layers: int
    neurons: int  # per layer
    hidden: int  # length of a row
    gated: bool
    dtype: str  # of the checkpoint, a key of DTYPE_BYTES
    packed: str = ""  # what its rows are packed as, one of PACKED; "": they are of `dtype`

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.gated]

    @property
    def number_format(self) -> str:
        """Of a bundle's rows."""
        return self.packed or self.dtype

    @property
    def item_bytes(self) -> int:
        """Of a number in the checkpoint."""
        return DTYPE_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.number_format, self.hidden)

    @property
    def compute_dtype(self) -> str:
        """Number format of activations, KV cache and resident weights in memory."""
        return COMPUTE_DTYPES[self.dtype]

    @property
    def bundle_bytes(self) -> int:
        return len(self.parts) * self.row_bytes

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


def row_bytes(number_format: str, width: int) -> int:
    """Bytes of a row of `width` numbers, with its scales."""
    if number_format == "int8":
        return width
    if number_format == "int4":
        return width // 2 + width // GROUP * 4
    return width * DTYPE_BYTES[number_format]


def pack_problem(number_format: str, width: int) -> str:
    """Why rows of `width` numbers cannot be packed as `number_format`; "" if they can be."""
    step = GROUP if number_format == "int4" else SCALED
    if number_format in PACKED and width % step:
        return f"{number_format} takes rows of a multiple of {step} numbers, these have {width:,}"
    return ""
