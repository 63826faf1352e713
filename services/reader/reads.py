"""Plans reads: neuron ids and slots in, reads of a bundle file out. A pure function.

Neighbouring bundles become one read that scatters into their slots, which need not be neighbours.
Gaps are not read over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.limits import READ_BUNDLES_MAX, READ_BYTES_MAX


@dataclass(frozen=True)
class Reads:
    """Reads of one file. Read i takes bytes from `offsets[i]` on into the slots
    `slots[firsts[i] : firsts[i + 1]]`, one stride each, in that order."""

    offsets: npt.NDArray[np.int64]  # [reads], bytes
    firsts: npt.NDArray[np.int64]  # [reads + 1], the last is the number of bundles
    slots: npt.NDArray[np.int64]  # [bundles], in the whole cache
    stride_bytes: int

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each read, [reads]."""
        return np.diff(self.firsts) * self.stride_bytes


def plan_reads(
    ids: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], stride_bytes: int
) -> Reads:
    """The fewest reads that bring bundles `ids` (strictly ascending) into `slots` (same length),
    none larger than READ_BYTES_MAX or READ_BUNDLES_MAX (a bundle larger than that is one read)."""
    bundles_max = max(1, min(READ_BUNDLES_MAX, READ_BYTES_MAX // stride_bytes))
    begins = np.ones(len(ids) + 1, np.bool_)  # the end begins nothing, and ends the last run
    np.not_equal(ids[1:], ids[:-1] + 1, out=begins[1:-1])
    firsts = np.flatnonzero(begins)
    if (firsts[1:] - firsts[:-1]).max(initial=0) > bundles_max:
        index = np.arange(len(ids) + 1)
        run_first = np.maximum.accumulate(np.where(begins, index, 0))
        firsts = np.flatnonzero((index - run_first) % bundles_max == 0)
    offsets = ids[firsts[:-1]] * stride_bytes
    return Reads(offsets, firsts, slots, stride_bytes)
