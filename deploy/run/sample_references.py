"""The driver's references to the samples of a run, held long enough for Ray to free their values.

The driver owns every sample because it called `score`; the replay queue and the learner's ranks borrow them. Ray keeps
a value below 100 kB in the memory of its owner and not in the object store, and Ray 2.60 frees it there only if the
owner's reference is the last one to go. If a borrower's reference goes last, the value stays until the owner ends: that
was 1.2 MB for each round of the demo. So the driver lets go last.
"""

from __future__ import annotations

import time
from collections import deque

from opdlm.common.samples import SampleRef

_GRACE_SECONDS = 10.0
"""Time from a checkpoint that covers a sample to its release here, so that the borrowers' releases arrive first."""


class SampleReferences:
    """Holds references from when samples are made until a checkpoint covers them, and `grace_seconds` longer.

    The replay queue holds them until the checkpoint too, so this lengthens a sample's life only by the grace time.
    """

    def __init__(self, prompts_per_round: int, grace_seconds: float = _GRACE_SECONDS) -> None:
        self.prompts_per_round, self.grace_seconds = prompts_per_round, grace_seconds
        self._held: list[tuple[int, SampleRef]] = []
        self._leaving: deque[tuple[float, list[SampleRef]]] = deque()

    def hold(self, indices: list[int], samples: list[SampleRef]) -> None:
        """Holds samples by their indices; a sample that is made twice has two references."""
        self._held += zip(indices, samples, strict=True)

    def committed(self, rounds: int) -> None:
        """A checkpoint covers this many rounds. Call this regularly, also with an unchanged number."""
        covered, now = rounds * self.prompts_per_round, time.monotonic()
        if leaving := [sample for index, sample in self._held if index < covered]:
            self._held = [(index, sample) for index, sample in self._held if index >= covered]
            self._leaving.append((now, leaving))
        while self._leaving and now - self._leaving[0][0] >= self.grace_seconds:
            self._leaving.popleft()
