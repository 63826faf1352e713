"""How long a token takes: pure arithmetic over a machine's cost model. Milliseconds.

    products     bytes that a token multiplies ÷ the machine's speed for each kind of product
    predictor    the layer's own factors: compute waits for them
    processes    Python and messages of a layer, by the doctor's own small server; more where more
                 neurons are named
    reads        what compute waits for of the misses: a layer's fetch, its parts where the cache
                 has few slots, its demand's reads, and what look-ahead could not hide of the others

The shares and factors below were fitted to servers that were measured (docs/forecast.md has them,
and how far runs lay from this). Overlap is what they say least about: a machine with more cores
hides more than the two that they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.forecast.machine import Machine
from common.plan import parts_of
from common.store.geometry import DTYPE_BYTES, Geometry

NAMED_US = 3.0  # of reader, predictor and messages, for a neuron that is named
LAYER_MS = 4.0  # where the figures of Python's work here were taken: another machine's are scaled
FETCH_SHARE = 0.4  # of a layer's process time, where something has to be read
READER_US = 12.0  # of the reader's own work for a read
DEMAND_LEAST = 0.18  # of misses that look-ahead does not bring, however large the cache
DEMAND_FALL = 0.75  # and how that falls as the cache grows by what is named
EXPOSED_AHEAD = 0.3  # of the time of reads made ahead, that compute still waits for
WASTE_MOST = 0.25  # read ahead for nothing, of what is missed
WASTE_FROM, WASTE_OVER = 0.5, 2.0  # caches, by what is named, from which and over which it grows
PART_SHARE = 0.3  # of a layer's process time, for a part of a streamed layer


@dataclass(frozen=True)
class Work:
    """What a token asks of the machine, all layers together."""

    multiplied_bytes: int  # resident, as computed
    context_bytes: float  # keys and values
    named: float  # neurons
    fired: float
    missed: float
    cache_by_named: float  # slots for each neuron that is named
    same_bytes: int  # of the predictors that compute waits for
    extra_parts: int  # in which layers stream because their slots are few

    @property
    def demand_share(self) -> float:
        """Of what is missed: what its layer asks for itself."""
        return min(1.0, max(DEMAND_LEAST, 1.0 - DEMAND_FALL * self.cache_by_named))

    @property
    def wasted(self) -> float:
        """Neurons that are read ahead for nothing."""
        grown = (self.cache_by_named - WASTE_FROM) / WASTE_OVER
        return self.missed * WASTE_MOST * min(1.0, max(0.0, grown))

    @property
    def read(self) -> float:
        """Neurons read."""
        return self.missed + self.wasted


@dataclass(frozen=True)
class Token:
    """Milliseconds by cause."""

    products: float
    predictor: float
    processes: float
    reads: float

    @property
    def total(self) -> float:
        return self.products + self.predictor + self.processes + self.reads


def token_ms(machine: Machine, geometry: Geometry, work: Work) -> Token:
    """A token's time with `work`."""
    speeds = machine.decode[geometry.dtype]
    row = geometry.row_bytes
    products = (
        work.multiplied_bytes / speeds["resident"]
        + work.context_bytes / speeds["context"]
        + work.named * row / speeds["named"]
        + work.fired * (len(geometry.parts) - 1) * row / speeds["fired"]
    )
    pace = machine.layer_ms / LAYER_MS
    # The doctor's layer named some neurons, too.
    layer_ms = max(machine.layer_ms - machine.named_per_layer * NAMED_US * 1e-3 * pace, 0.0)
    processes = geometry.layers * layer_ms + work.named * NAMED_US * 1e-3 * pace
    return Token(
        products=1e3 * products,
        predictor=1e3 * work.same_bytes / machine.predictor_bytes_per_s,
        processes=processes,
        reads=_reads_ms(machine, geometry, work, layer_ms),
    )


def _reads_ms(machine: Machine, geometry: Geometry, work: Work, layer_ms: float) -> float:
    if not work.missed:
        return 0.0
    pace = machine.layer_ms / LAYER_MS
    one = max(machine.drive.seconds(1, geometry.stride_bytes) * 1e3, READER_US * 1e-3 * pace)
    demand = work.missed * work.demand_share
    touched = min(1.0, work.missed / geometry.layers)  # layers that miss anything at all
    fetches = touched * geometry.layers * FETCH_SHARE * layer_ms
    fetches += work.extra_parts * PART_SHARE * machine.layer_ms
    return fetches + one * (demand + EXPOSED_AHEAD * (work.read - demand))


def extra_parts(missed: float, slots: int) -> int:
    """Parts in which a layer's `missed` neurons stream through `slots`, beyond those that they
    take where there is room: as services/reader/fetches.py makes them."""
    usual = parts_of(missed)
    few = min(max(-(-missed // usual), 1), max(1, slots // 2))
    return max(int(-(-missed // few)) - usual, 0)


def prompt_ms(
    machine: Machine,
    geometry: Geometry,
    multiplied_bytes: int,
    tokens: int,
    block: int,
    touched: float,
    cached: float,
    parts: int,
) -> float:
    """Time to the first token after a prompt.

    Args:
        multiplied_bytes: resident, as computed.
        block: tokens that go through the model together.
        touched: share of the FFN that the prompt's tokens need: of a long prompt all.
        cached: share of that which need not be read.
        parts: of all layers together, that are read and multiplied in turn.
    """
    total = 0.0
    for first in range(0, tokens, block):
        rows = min(block, tokens - first)
        bundles = geometry.layers * geometry.neurons * touched
        resident_s, ffn_s = (
            machine.block_seconds(geometry.dtype, kind, rows) for kind in ("resident", "ffn")
        )
        computing = multiplied_bytes * resident_s + bundles * geometry.bundle_bytes * ffn_s
        reading = bundles * geometry.stride_bytes * (1 - cached) / machine.drive.bytes_per_s
        python = (geometry.layers + parts * PART_SHARE) * machine.layer_ms
        total += 1e3 * max(computing, reading) + python
    return total


def computed_bytes(geometry: Geometry, stored: int) -> int:
    """Resident bytes as they are in memory, of those in the checkpoint."""
    return stored * DTYPE_BYTES[geometry.compute_dtype] // geometry.item_bytes
