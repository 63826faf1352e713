"""Which slots are given up: a pure function of a layer's slots. It knows no neuron and no file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


def evict(
    last_used: npt.NDArray[np.int64],
    held: npt.NDArray[np.bool_],
    now: int,
    window: int | None,
    want: int,
) -> Slots:
    """The slots to give up: those that left the window, and more if `want` asks for more.

    `last_used` [slots] is the token in which each slot's neuron was last used, `now` is the present
    token. `held` [slots] marks what must stay: slots that are pinned, being loaded, or free. Of the
    others, every one that was used in none of the last `window` tokens leaves (with a window of
    None: none does), then the least recently used, until `want` slots are given up or none is left.
    Returns int32 [given up], in no order.
    """
    candidates = np.flatnonzero(~held).astype(np.int32)
    unused = now - last_used[candidates]
    outside = 0 if window is None else int(np.count_nonzero(unused > window))
    # The longest unused are both those outside the window and the next to go: one cut does both.
    count = min(max(want, outside), len(candidates))
    if count == len(candidates):
        return candidates
    if count == 0:
        return candidates[:0]
    return candidates[np.argpartition(-unused, count - 1)[:count]]
