"""`python -m services.reader`: the reader process of the Procfile."""

from common.lifecycle import run
from services.reader.loop import serve

if __name__ == "__main__":
    run("reader", serve)
