"""`python -m services.compute`: the compute process of the Procfile."""

import os

# Before torch's import. Threads that spin between products starve reader and predictor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from common.lifecycle import run
from services.compute.loop import serve

# Kernels that oneDNN keeps for matrix shapes it has seen, 0.5 to 2 MB each: 1,024 by default, which
# prompts of different lengths fill. Read at the first product, so after torch's import is in time.
for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")

if __name__ == "__main__":
    run("compute", serve)
