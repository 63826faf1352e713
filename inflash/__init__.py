"""inflash: language models whose feed-forward weights stay on flash. This is the client.

    with inflash.Client() as client:
        for token in client.generate("def add(a, b):"):
            print(token.text, end="", flush=True)

The server runs from a checkout: see the README.
"""

from inflash._async_client import AsyncClient, AsyncGeneration
from inflash._client import Client, Generation
from inflash._errors import (
    InflashError,
    RequestFailed,
    RequestRefused,
    ServerLost,
    ServerNotFound,
)
from inflash._generation import Prefill, Token
from inflash._messages import Stats
from inflash._version import __version__

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "Generation",
    "InflashError",
    "Prefill",
    "RequestFailed",
    "RequestRefused",
    "ServerLost",
    "ServerNotFound",
    "Stats",
    "Token",
    "__version__",
]
