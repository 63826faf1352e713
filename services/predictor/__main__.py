"""`python -m services.predictor`: the predictor process of the Procfile."""

import os

# Before numpy's import. One more thread would take a core from compute, and spin between products.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from common.lifecycle import run
from services.predictor.loop import serve

if __name__ == "__main__":
    run("predictor", serve)
