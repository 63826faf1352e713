"""`python -m services.gateway`: the gateway process of the Procfile."""

from common.lifecycle import run
from services.gateway.loop import serve

if __name__ == "__main__":
    run("gateway", serve)
