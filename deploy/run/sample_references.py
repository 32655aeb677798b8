"""The driver's own references to the samples on their way, so that Ray frees their values.

The driver owns every sample (it called `score`), the replay queue and the learner's ranks only borrow it. A sample
below Ray's 100 kB is not in the object store but in the memory of its owner, and Ray (2.60) frees it there only where
the owner's reference is the last one to go: where a borrower's is, the value stays until the owner ends. That was
1.2 MB for each round of the demo. So the driver lets go last.
"""

from __future__ import annotations

import time
from collections import deque

from opdlm.common.samples import SampleRef

_GRACE_SECONDS = 10.0
"""Between a checkpoint that covers a sample and our letting go: the borrowers let go at once, but by message."""


class SampleReferences:
    """References to samples from their making until a checkpoint covers them, and a little longer.

    The replay queue keeps them as long, so nothing lives longer for it than the grace.
    """

    def __init__(self, prompts_per_round: int, grace_seconds: float = _GRACE_SECONDS) -> None:
        self.prompts_per_round, self.grace_seconds = prompts_per_round, grace_seconds
        self._kept: list[tuple[int, SampleRef]] = []
        self._leaving: deque[tuple[float, list[SampleRef]]] = deque()

    def keep(self, indices: list[int], samples: list[SampleRef]) -> None:
        """Samples by their indices; one that is made twice has two references."""
        self._kept += zip(indices, samples, strict=True)

    def committed(self, rounds: int) -> None:
        """A checkpoint covers this many rounds. To be called now and then, with the same number too."""
        covered, now = rounds * self.prompts_per_round, time.monotonic()
        if leaving := [sample for index, sample in self._kept if index < covered]:
            self._kept = [(index, sample) for index, sample in self._kept if index >= covered]
            self._leaving.append((now, leaving))
        while self._leaving and now - self._leaving[0][0] >= self.grace_seconds:
            self._leaving.popleft()
