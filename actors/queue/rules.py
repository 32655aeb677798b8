"""The replay queue's rules, without Ray: slots, staleness, the ledger of samples.

A sample is an index in the run's order of prompts; round r is the indices `[r N, (r+1) N)`. Its life:

    leased ──put──► ready ──take_round──► taken ──published──► trained ──committed──► forgotten
       ▲ a free slot      │ lose                                 (weights r+1 exist)   (a checkpoint holds them)
       └──────────────────┘ its data died with a node: made again in its slot

Slots bound staleness: round r may be leased only after the rollout actors took weights of version r - max_staleness
or newer. There are `(max_staleness + 1) x N` slots, so the queue is bounded by construction and never drops.
Taken samples are kept until a checkpoint covers them: a learner that dies in between trains the same samples again
from that checkpoint, and each counts exactly once in the surviving weights.
"""

from __future__ import annotations

from typing import Any


class ReplayQueue:
    """State machine over sample indices; the samples themselves are opaque (object references in the run).

    Args:
        prompts_per_round: N.
        max_staleness: rounds that decoding may run ahead.
        total: samples in the run.
        first_round: round to begin with (resume); everything before it is trained.
    """

    def __init__(self, prompts_per_round: int, max_staleness: int, total: int, first_round: int = 0) -> None:
        self.prompts_per_round = prompts_per_round
        self.max_staleness = max_staleness
        self.total = total
        self.rounds = -(-total // prompts_per_round)
        self.version: int | None = None
        """Newest weight version that the rollout actors have taken (v has seen rounds 0 to v-1); None before any."""
        self.trained_rounds = first_round
        """Rounds whose weights the learner has published."""
        self.committed_rounds = first_round
        """Rounds that a checkpoint covers."""
        self.handed_rounds: set[int] = set()
        """Rounds that a learner rank has taken."""
        self.refused: dict[str, int] = {"duplicate": 0, "stale": 0}
        self._first = self._next = min(first_round * prompts_per_round, total)
        self._leased: set[int] = set()
        self._lost: list[int] = []
        self._samples: dict[int, tuple[int, Any]] = {}  # index -> (weight version, sample), until committed

    def round_of(self, index: int) -> int:
        """The round that trains this sample."""
        return index // self.prompts_per_round

    def indices_of(self, round_: int) -> range:
        """The samples of a round; the last round may be smaller."""
        start = round_ * self.prompts_per_round
        return range(start, min(start + self.prompts_per_round, self.total))

    @property
    def free_slots(self) -> int:
        """Samples that could be leased now; none before the rollout actors have taken their first weights."""
        if self.version is None:
            return 0
        limit = min((self.version + self.max_staleness + 1) * self.prompts_per_round, self.total)
        return max(limit - self._next, 0)

    @property
    def slots_in_use(self) -> int:
        """Samples leased whose weights the rollout actors have not taken: decoding, scoring, ready, in training."""
        freed = self._first if self.version is None else self.version * self.prompts_per_round
        return max(self._next - freed, 0)

    @property
    def depth(self) -> int:
        """Samples ready and not yet taken by the learner."""
        return sum(self.round_of(index) not in self.handed_rounds for index in self._samples)

    @property
    def lost(self) -> int:
        """Samples whose data is gone and that wait to be leased again."""
        return len(self._lost)

    @property
    def leased(self) -> int:
        """Samples being decoded or scored."""
        return len(self._leased)

    def lease(self, most: int) -> list[int]:
        """The next samples to decode, in order: as many as slots are free, at most `most`; may be empty.

        Lost ones come first: they still have their slots, and the learner waits for them.
        """
        again = self.lease_lost(most)
        indices = list(range(self._next, self._next + min(most - len(again), self.free_slots)))
        self._next += len(indices)
        self._leased.update(indices)
        return again + indices

    def lease_lost(self, most: int) -> list[int]:
        """Lost samples to make again, at most `most`."""
        again, self._lost = self._lost[:most], self._lost[most:]
        self._leased.update(again)
        return again

    def lose(self, index: int, sample: Any) -> bool:
        """A sample's data is gone. False: that was known, and another sample stands or comes in its place."""
        if self.sample(index) != sample:
            return False
        del self._samples[index]
        self._lost.append(index)
        return True

    def sample(self, index: int) -> Any:
        """The accepted sample of an index; None while there is none, or where a checkpoint covers it."""
        return self._samples.get(index, (0, None))[1]

    def put(self, index: int, weight_version: int, sample: Any) -> bool:
        """Accepts a finished sample; False (and counted) if it was already accepted or is too stale."""
        if index not in self._leased:
            self.refused["duplicate"] += 1
            return False
        if self.round_of(index) - weight_version > self.max_staleness:
            self.refused["stale"] += 1
            return False
        self._leased.remove(index)
        self._samples[index] = (weight_version, sample)
        return True

    def is_ready(self, round_: int) -> bool:
        """Every sample of the round is here."""
        return all(index in self._samples for index in self.indices_of(round_))

    def take_round(self, round_: int) -> list[Any]:
        """The round's samples in index order; every learner rank takes the same list, again after a restart."""
        if not self.is_ready(round_):
            raise ValueError(f"round {round_} is not ready or no longer kept (committed: {self.committed_rounds})")
        self.handed_rounds.add(round_)
        return [self._samples[index][1] for index in self.indices_of(round_)]

    def staleness(self, round_: int) -> list[int]:
        """Rounds between decoding and training, per sample of a ready round; below 0 where one was made again later."""
        return [round_ - self._samples[index][0] for index in self.indices_of(round_)]

    def published(self, version: int) -> None:
        """The learner has trained rounds 0 to version-1. An older version after a restart changes nothing."""
        self.trained_rounds = max(self.trained_rounds, version)

    def weights_taken(self, version: int) -> None:
        """The rollout actors decode with this version: the slots of the rounds it learned from are free."""
        if version > self.trained_rounds:
            raise ValueError(f"version {version} was taken but only {self.trained_rounds} was published")
        self.version = version if self.version is None else max(self.version, version)

    def committed(self, rounds: int) -> None:
        """A checkpoint holds rounds 0 to rounds-1: their samples are no longer needed."""
        self.committed_rounds = max(self.committed_rounds, rounds)
        for index in [i for i in self._samples if self.round_of(i) < self.committed_rounds]:
            del self._samples[index]
        self.handed_rounds = {r for r in self.handed_rounds if r >= self.committed_rounds}
