"""The one exception whose text is meant for the user: a single line that says what, where, found, and right."""

from __future__ import annotations


class OpdlmError(Exception):
    """A mistake that the user can mend. The command line prints its text, without a traceback, and exits with 2."""


class ConfigError(OpdlmError):
    """A setting that cannot be right, named by its path in the YAML (`rollout.block_size`)."""
