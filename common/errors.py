"""Errors whose text is for the user: one line that says where, what was found, and what would be right."""

from __future__ import annotations


class OpdlmError(Exception):
    """A mistake that the user can correct. The command line prints its text, without a traceback, and exits with 2."""


class ConfigError(OpdlmError):
    """A wrong setting. The text names it by its path in the YAML (`rollout.block_size`)."""


class WeightsLost(OpdlmError):
    """The weights of a published version can no longer be loaded, because the rank or node that held them has died."""


class StreamLost(OpdlmError):
    """A rollout actor has no stream to add to: it died with it, and Ray has restarted it before anybody called it."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its class where the text is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's text.

    A Ray error quotes the traceback of the actor; its last line gives the reason. An error without text gives its kind.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
