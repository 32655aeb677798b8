"""Repeating what failed: a limited number of attempts, and pauses while Ray's object store is full.

A loop whose call finds the object store full waits, and uses up none of its attempts. Ray moves objects that do not
fit to disk and back by itself. Where the disk is full too (above `local_fs_capacity_threshold`, 95 %), what an actor
returns cannot be stored, and its call fails. A call with several
outputs fails as a whole: Ray stores the outputs in order, and the small value that an actor pool waits for comes last.

Ray's errors are recognised by their class names, because `common` does not import ray.
"""

from __future__ import annotations

import time

from opdlm.common.errors import OpdlmError, last_line

LONGEST_PAUSE_SECONDS = 60.0
_FULL = {"ObjectStoreFullError", "OutOfDiskError"}


def store_is_full(error: BaseException | None) -> bool:
    """Whether an error of Ray, or the error in the actor that caused it, says that the object store is full."""
    while error is not None:
        if any(kind.__name__ in _FULL for kind in type(error).__mro__):
            return True
        error = getattr(error, "cause", None)
    return False


class Attempts:
    """Counts the failed attempts at one operation.

    Args:
        what: names the operation in the error.
        limit: attempts in all (`resources.sample_attempts`).
    """

    def __init__(self, what: str, limit: int) -> None:
        self.what, self.limit = what, limit
        self.failed = 0

    def note(self, error: BaseException) -> None:
        """Counts a failure.

        Raises:
            OpdlmError: it was the last attempt.
        """
        self.failed += 1
        if self.failed >= self.limit:
            reason = last_line(error)
            raise OpdlmError(f"{self.what} failed {self.failed} times (resources.sample_attempts): {reason}") from error


class StoreWait:
    """Pauses between the attempts at one operation: each twice as long as the last, up to a minute, with a total limit.

    Args:
        limit_seconds: longest time from the first pause on (`resources.call_timeout_seconds`).
        first_seconds: length of the first pause.
    """

    def __init__(self, limit_seconds: float, first_seconds: float = 1.0) -> None:
        self._limit, self._next = limit_seconds, first_seconds
        self._started: float | None = None

    def pause(self, what: str) -> float:
        """Seconds to wait before the next attempt. `what`: names the operation in the error.

        Raises:
            OpdlmError: there has been no room for `limit_seconds`.
        """
        now = time.monotonic()
        self._started = self._started or now
        left = self._started + self._limit - now
        if left <= 0:
            raise OpdlmError(
                f"{what}: Ray's object store and its disk were full for {self._limit:g} s "
                "(resources.call_timeout_seconds); the queue keeps all samples since the last checkpoint: give the "
                "cluster more object store or spill space, or lower checkpoint.every_rounds, queue.max_staleness, "
                "rollout.prompts_per_round or the size of teacher.targets"
            )
        seconds, self._next = min(self._next, left), min(2 * self._next, LONGEST_PAUSE_SECONDS)
        return seconds
