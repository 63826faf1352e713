"""`python -m services.predictor`: the predictor process of the Procfile."""

from common.lifecycle import run
from services.predictor.loop import serve

if __name__ == "__main__":
    run("predictor", serve)
