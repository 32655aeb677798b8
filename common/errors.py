"""The one exception whose text is meant for the user: a single line that says what, where, found, and right."""

from __future__ import annotations


class OpdlmError(Exception):
    """A mistake that the user can mend. The command line prints its text, without a traceback, and exits with 2."""


class ConfigError(OpdlmError):
    """A setting that cannot be right, named by its path in the YAML (`rollout.block_size`)."""


class WeightsLost(OpdlmError):
    """The data of a published weight version is out of reach: the learner's rank or node that held it has died, say."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for an error of ours; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: of a Ray error, which quotes a traceback, the one that says why."""
    return str(error).strip().splitlines()[-1]
