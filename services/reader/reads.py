"""Plans reads: neuron ids and slots in, reads of a bundle file out. A pure function.

Neighbouring bundles become one read that scatters into their slots, which need not be neighbours.
A gap of a few bundles may be read over, where one larger read costs less than two. Its bytes have
to land somewhere: all of them in one slot, the sink, that holds no bundle and is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.limits import READ_BUNDLES_MAX, READ_BYTES_MAX


@dataclass(frozen=True)
class Reads:
    """Reads of one file. Read i takes bytes from `offsets[i]` on into the slots
    `slots[firsts[i] : firsts[i + 1]]`, one stride each, in that order; a gap's go to the sink."""

    offsets: npt.NDArray[np.int64]  # [reads], bytes
    firsts: npt.NDArray[np.int64]  # [reads + 1], the last is the number of bundles, gaps included
    slots: npt.NDArray[np.int32]  # [bundles], in the whole cache
    stride_bytes: int
    gap_bundles: int = 0  # of them: read, and not asked for

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each read, gaps included, [reads]."""
        return np.diff(self.firsts) * self.stride_bytes

    @property
    def gap_bytes(self) -> int:
        """Bytes that are read and were not asked for."""
        return self.gap_bundles * self.stride_bytes


def plan_reads(
    ids: npt.NDArray[np.int32],
    slots: npt.NDArray[np.int32],
    stride_bytes: int,
    gap_bundles: int = 0,
    sink: int | None = None,
) -> Reads:
    """Reads that bring bundles `ids` (strictly ascending) into `slots` (same length), none larger
    than READ_BYTES_MAX or READ_BUNDLES_MAX (a bundle larger than that is one read).

    Gaps of up to `gap_bundles` bundles are read over, into the slot `sink`. With 0 they are the
    fewest reads that bring nothing else.
    """
    bundles_max = max(1, min(READ_BUNDLES_MAX, READ_BYTES_MAX // stride_bytes))
    firsts = _firsts(ids, gap_bundles, bundles_max)
    from_ids = ids[firsts[:-1]]
    offsets = from_ids.astype(np.int64) * stride_bytes
    ends = np.cumsum(ids[firsts[1:] - 1] - from_ids + 1, dtype=np.int64)
    gaps = int(ends[-1]) - len(ids) if len(ids) else 0
    if gaps == 0:
        return Reads(offsets, firsts, slots, stride_bytes)
    if sink is None:
        raise ValueError("a gap is to be read over, and there is no sink for its bytes")
    spread = np.concatenate(([0], ends))
    targets = np.full(spread[-1], sink, np.int32)
    targets[ids + np.repeat(spread[:-1] - from_ids, np.diff(firsts))] = slots
    return Reads(offsets, spread, targets, stride_bytes, gaps)


def _firsts(
    ids: npt.NDArray[np.int32], gap_bundles: int, bundles_max: int
) -> npt.NDArray[np.int64]:
    """[reads + 1]: the place in `ids` of each read's first bundle, and the end. A read spans at
    most `bundles_max` bundles."""
    begins = np.ones(len(ids) + 1, np.bool_)  # the end begins nothing, and ends the last run
    np.greater(ids[1:] - ids[:-1], gap_bundles + 1, out=begins[1:-1])
    firsts = np.flatnonzero(begins)
    run_from = ids[firsts[:-1]]
    if (ids[firsts[1:] - 1] - run_from).max(initial=0) < bundles_max:
        return firsts
    piece = (ids - np.repeat(run_from, np.diff(firsts))) // bundles_max  # of its run
    begins[1:-1] |= piece[1:] != piece[:-1]
    return np.flatnonzero(begins)
