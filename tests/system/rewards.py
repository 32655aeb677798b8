"""A reward for tests of whole runs: every response of a random model gets another one."""

from __future__ import annotations

from opdlm.common.rewards import Attempt


def variety(attempt: Attempt) -> float:
    """How many different characters the response has, and how long it is."""
    return len(set(attempt.response)) + len(attempt.response) / 100
