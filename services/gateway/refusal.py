"""The answer to a request that does not begin."""


class Refusal(Exception):  # noqa: N818
    """Why; the text goes to the client."""
