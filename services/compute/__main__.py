"""`python -m services.compute`: the compute process of the Procfile."""

from common.lifecycle import run
from services.compute.loop import serve

if __name__ == "__main__":
    run("compute", serve)
