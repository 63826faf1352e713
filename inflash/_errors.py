"""The errors that a user of the client meets.

InflashError
├── ServerNotFound        no server answers in the run directory
└── RequestFailed         one request failed; `.service` says who failed it, `.reason` why
    ├── RequestRefused    it never began: the queue is full, or the prompt does not fit
    └── ServerLost        the gateway went away or stopped answering
"""

from __future__ import annotations


class InflashError(Exception):
    """Anything that inflash reports to its user; the text says what is wrong and what to do."""


class ServerNotFound(InflashError):  # noqa: N818  (named for what happened)
    """No server answers in the run directory."""


class RequestFailed(InflashError):  # noqa: N818
    """One request failed, or the service that it needs did."""

    def __init__(self, service: str, reason: str):
        super().__init__(f"{service}: {reason}")
        self.service = service
        self.reason = reason


class RequestRefused(RequestFailed):
    """The request never began."""


class ServerLost(RequestFailed):
    """The gateway went away while a request was under way."""
