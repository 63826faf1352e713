"""Slowed on purpose: the setting `slow`, by which one sees what a slow part does to a token.

    reads:1%:20ms       one batch of reads in a hundred ends 20 ms later, as on a drive that stalls
    predictor:3ms       the predictor takes 3 ms more to name a layer's neurons

Both may be given, with a comma between. For diagnosis and for tests of `inflash trace`; what is
slowed is slow in earnest, and nothing else changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_READS = re.compile(r"reads:(\d+(?:\.\d+)?)%:(\d+(?:\.\d+)?)ms")
_PREDICTOR = re.compile(r"predictor:(\d+(?:\.\d+)?)ms")
_READS_S_MAX = 10.0
_PREDICTOR_S_MAX = 1.0  # a service that is silent for longer is lost


@dataclass(frozen=True)
class Slow:
    """What is slowed: nothing by default."""

    reads_share: float = 0.0  # of the batches of reads
    reads_s: float = 0.0
    predictor_s: float = 0.0


NOT_SLOWED = Slow()


def parse_slow(text: str) -> Slow:
    """The setting's value; `ValueError` for anything else."""
    share = reads_s = predictor_s = 0.0
    for item in text.split(","):
        if match := _READS.fullmatch(item.strip()):
            share, reads_s = float(match[1]) / 100, float(match[2]) / 1000
        elif match := _PREDICTOR.fullmatch(item.strip()):
            predictor_s = float(match[1]) / 1000
        else:
            raise ValueError(f"{text!r:.60} is not as reads:1%:20ms or predictor:3ms")
    if share > 1 or reads_s > _READS_S_MAX:
        raise ValueError(f"{text!r:.60}: at most 100% of reads, {_READS_S_MAX * 1000:.0f}ms late")
    if predictor_s > _PREDICTOR_S_MAX:
        raise ValueError(f"{text!r:.60}: a predictor at most {_PREDICTOR_S_MAX * 1000:.0f}ms late")
    return Slow(share, reads_s, predictor_s)
