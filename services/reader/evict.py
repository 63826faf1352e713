"""Which slots are given up: a pure function of a layer's slots. It knows no neuron and no file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]

_NEVER = np.iinfo(np.int64).max  # later than any token: what is held comes last


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
    used = np.where(held, _NEVER, last_used)
    outside = 0 if window is None else int(np.count_nonzero(used < now - window))
    # The longest unused are both those outside the window and the next to go: one cut does both.
    count = min(max(want, outside), len(held) - int(np.count_nonzero(held)))
    if count == 0:
        return np.empty(0, np.int32)
    return np.argpartition(used, count - 1)[:count].astype(np.int32)
