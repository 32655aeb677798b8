"""A round's samples as one rank uses them: fetched when a step needs them, and made again where their data is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.exceptions import ObjectLostError

from opdlm.common.errors import OpdlmError
from opdlm.common.samples import SampleRef, distinct_groups
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.queue_client import QueueClient


class RoundSamples:
    """The samples of one round by their places in it.

    Args:
        samples: in index order, as the queue gave them.
        first: index of the round's first sample.
        queue: fetches samples, and has lost ones made again.
    """

    def __init__(self, samples: Sequence[SampleRef], first: int, queue: QueueClient) -> None:
        self.samples, self._first, self._queue = list(samples), first, queue
        self._shared: dict[Any, list[ScoredTrajectory]] = {}
        """Fetched lists of several small samples, by reference: nearly every step needs one of each. A large sample has
        a reference of its own, and is not kept here."""

    def fetch(self, places: Sequence[int]) -> list[ScoredTrajectory]:
        """Samples by their places.

        Raises:
            OpdlmError: a sample did not arrive in time, or arrived under another sample's index.
        """
        wanted = [self.samples[place] for place in places]
        new = [group for group in distinct_groups(wanted) if group not in self._shared]
        try:
            fetched = dict(zip(new, self._queue.wait_for(new, "scored trajectories"), strict=True))
        except ObjectLostError:
            found = [self._fetch_one(place) for place in places]
        else:
            self._keep(fetched)
            groups = self._shared | fetched
            found = [groups[sample.group][sample.place] for sample in wanted]
        for place, sample in zip(places, found, strict=True):
            if (index := sample.trajectory.index) != self._first + place:
                raise OpdlmError(f"sample {index} came where sample {self._first + place} belongs")
        return found

    def _keep(self, groups: dict[Any, list[ScoredTrajectory]]) -> None:
        self._shared |= {reference: group for reference, group in groups.items() if len(group) > 1}

    def _fetch_one(self, place: int) -> ScoredTrajectory:
        while True:
            sample = self.samples[place]
            try:
                group = self._shared.get(sample.group) or self._queue.wait_for(sample.group, "a scored trajectory")
            except ObjectLostError:
                self.samples[place] = self._queue.remade_sample(self._first + place, sample)
            else:
                self._keep({sample.group: group})
                return group[sample.place]
