"""Compute, and the programs that measure its products (`speeds.py`, `measure.py`)."""

import os

# Before torch's import, for all of them. Resident matrices in pages of 2 MB: products read them a
# quarter faster (docs/measurements.md). numpy asks for such pages by itself.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Of torch's own threads no thread of ours has any (products.py). Said here, for what
# torch.set_num_threads says holds for the thread that says it: in a script, products of the other
# threads took half as long again.
os.environ["OMP_NUM_THREADS"] = "1"
