"""How many responses a server makes at a time, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opdlm.deploy.serve.errors import ApiError


class Admission:
    """Counts the responses that are being made or wait.

    Args:
        most: of them at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.active = 0
        """Responses that are being made or wait."""
        self.draining = False
        """Whether the server takes no more requests, because it is about to end."""

    @contextmanager
    def admit(self, responses: int) -> Iterator[None]:
        """Counts the responses of one request while the block runs.

        Raises:
            ApiError: 503, the server is draining; 429, its queue is full; 400, the request alone is too large.
        """
        if self.draining:
            raise ApiError(503, "the server is about to end and takes no more requests", "draining")
        if responses > self._most:
            raise ApiError(
                400, f"the request asks for {responses} responses; this server makes {self._most} at a time", "too_many"
            )
        if self.active + responses > self._most:
            raise ApiError(
                429, f"the queue is full: {self.active} of {self._most} responses wait or are made; try again", "full"
            )
        self.active += responses
        try:
            yield
        finally:
            self.active -= responses
