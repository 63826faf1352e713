"""Why a step ends early. Both end one request and leave the service running."""


class StepFailedError(Exception):
    """The step cannot be finished, or its result is of no use; `service` is to blame."""

    def __init__(self, service: str, reason: str):
        super().__init__(reason)
        self.service = service


class StepAbortedError(Exception):
    """The request was cancelled, or the service is stopping."""
