"""Why a step ends early. None of these ends the service."""


class StepFailedError(Exception):
    """The step cannot be finished, or its result is of no use; `service` is to blame."""

    def __init__(self, service: str, reason: str):
        super().__init__(reason)
        self.service = service


class StepAbortedError(Exception):
    """The requests were cancelled, or the service is stopping."""


class StepJoinedError(Exception):
    """A block of prompts had just begun when others came that fit into it: it begins anew."""
