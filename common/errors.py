"""Errors whose message is for the user: what is wrong, where, and what to do. No traceback."""


class UserError(Exception):
    """A mistake or a limit that the user can act on; ends a command or a service with status 1."""


class SettingError(UserError):
    """A setting that is unknown or has a bad value; the message starts with its key."""


class StoreError(UserError):
    """A store or a checkpoint that cannot be used as it is."""


class LinkError(UserError):
    """A peer that did not take or send a message in time; the message says who waited for what."""
