"""Compute, and the programs that measure its products (`speeds.py`, `measure.py`)."""

import os

# Before torch's import, for all of them. Resident matrices in pages of 2 MB: products read them a
# quarter faster (docs/measurements.md). numpy asks for such pages by itself.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
