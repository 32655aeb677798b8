"""The rules of the replay queue, without Ray: slots, staleness, and which samples are decoded, kept and forgotten.

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py ->
actors/rollout/decoder.py -> actors/teacher/scoring.py -> this file -> learner/train_step.py -> learner/losses.py. The
loops lease samples here before they are decoded and put them here once they are scored; the learner's ranks take whole
rounds. `ReplayQueueActor` (`actors/queue/actor.py`) is the Ray actor around these rules.

A sample is known by its index in the run's order of prompts; round r is the indices `[r N, (r+1) N)`. Its states:

    leased ──put──► ready ──take_round──► taken ──published──► trained ──committed──► forgotten
       ▲ a free slot      │ lose                                 (weights r+1 exist)   (a checkpoint covers it)
       └──────────────────┘ its data died with a node: it is made again in its slot

A sample that comes with weights that are too old is refused. It stays leased, and its producer makes it again.

Slots bound staleness: round r may be leased only after the rollout actors took weights of version r - max_staleness
or newer. There are `(max_staleness + 1) x N` slots, so the queue is bounded by construction and never drops a sample.
Taken samples are kept until a checkpoint covers them. A learner that dies before that trains the same samples again
from the last checkpoint, and each sample counts exactly once in the weights that survive.
"""

from __future__ import annotations

from typing import Any, Literal

Answer = Literal["accepted", "duplicate", "stale"]


class ReplayQueue:
    """State machine over sample indices; the samples themselves are opaque (in a run: object references).

    Args:
        prompts_per_round: N.
        max_staleness: number of rounds by which decoding may run ahead of training.
        total: number of samples in the run.
        first_round: round to begin with (after a resume); all rounds before it are trained.
        group: samples that are leased together, the responses to one prompt. Divides N and `total`.
    """

    def __init__(
        self, prompts_per_round: int, max_staleness: int, total: int, first_round: int = 0, group: int = 1
    ) -> None:
        self.group = group
        self.prompts_per_round = prompts_per_round
        self.max_staleness = max_staleness
        self.total = total
        self.rounds = -(-total // prompts_per_round)
        self.version: int | None = None
        """Newest weight version that the rollout actors have taken; None before the first. Version v was trained on
        rounds 0 to v - 1."""
        self.trained_rounds = first_round
        """Rounds whose weights the learner has published."""
        self.committed_rounds = first_round
        """Rounds that a checkpoint covers."""
        self.taken_rounds: set[int] = set()
        """Rounds that a learner rank has taken."""
        self.refused: dict[str, int] = {"duplicate": 0, "stale": 0}
        """Number of samples that `put` refused, by reason."""
        self.stops = self.ends_early = False
        """No new sample is leased; and the run is finished then, although rounds are left."""
        self.last_round = self.rounds
        """Rounds from this one on are neither leased nor taken; `rounds` unless the run was told to end earlier."""
        self._first_index = self._next_index = min(first_round * prompts_per_round, total)
        """Index of the run's first sample, and of the next sample that was never leased."""
        self._leased: set[int] = set()
        self._lost: list[int] = []
        self._samples: dict[int, tuple[int, Any]] = {}
        """By index: (weight version that decoded it, sample), from `put` until a checkpoint covers it."""

    def round_of(self, index: int) -> int:
        """The round that trains this sample."""
        return index // self.prompts_per_round

    def indices_of(self, round_: int) -> range:
        """The samples of a round; the last round may be smaller."""
        start = round_ * self.prompts_per_round
        return range(start, min(start + self.prompts_per_round, self.total))

    def stop(self, finish: bool) -> None:
        """Ends the run after the rounds that a rank has taken.

        Args:
            finish: it is finished then. Where an end was asked for before, that stays what it was, so that all ranks
                know one `ends_early`.
        """
        if finish and (self.stops or self.last_round < self.rounds):
            return
        self.ends_early |= finish
        self.stops = True

    def stop_after_round(self) -> None:
        """Ends the run after the round that is being made: the first one that is not trained."""
        self.last_round = min(self.last_round, self.trained_rounds + 1)

    def ends_before(self, round_: int) -> bool:
        """Whether the run ends before this round. An end waits for a round that was begun, even for lost samples."""
        return (self.stops or round_ >= self.last_round) and round_ not in self.taken_rounds

    @property
    def free_slots(self) -> int:
        """Number of new samples that could be leased now; 0 before the rollout actors hold their first weights, and
        after `stop`."""
        if self.version is None or self.stops:
            return 0
        rounds = min(self.version + self.max_staleness + 1, self.last_round)
        limit = min(rounds * self.prompts_per_round, self.total)
        return max(limit - self._next_index, 0)

    @property
    def slots_in_use(self) -> int:
        """Number of samples whose slot is not free yet: being decoded, scored, ready, or in training.

        A slot is freed when the rollout actors take the weights that its sample helped to train.
        """
        freed = self._first_index if self.version is None else self.version * self.prompts_per_round
        return max(self._next_index - freed, 0)

    @property
    def depth(self) -> int:
        """Number of samples that are ready and that no learner rank has taken."""
        return sum(self.round_of(index) not in self.taken_rounds for index in self._samples)

    @property
    def lost(self) -> int:
        """Number of samples whose data is gone and that wait to be leased again."""
        return len(self._lost)

    @property
    def leased(self) -> int:
        """Number of samples being decoded or scored."""
        return len(self._leased)

    def lease(self, most: int) -> list[int]:
        """Leases the next samples to decode, in order: as many as slots are free, at most `most`; may be empty.

        Lost samples come first: they still have their slots, and the learner waits for them. The last group is leased
        whole, even if that makes more than `most`.
        """
        groups = {index // self.group for index in self._lost[:most]}
        again = [index for index in self._lost if index // self.group in groups]
        self._lost = [index for index in self._lost if index // self.group not in groups]
        more = -(-max(most - len(again), 0) // self.group) * self.group
        indices = list(range(self._next_index, self._next_index + min(more, self.free_slots)))
        self._next_index += len(indices)
        self._leased.update(again + indices)
        return again + indices

    def lose(self, index: int, sample: Any) -> bool:
        """Notes that the data of a sample is gone, so that its index is leased again.

        Returns: False if `sample` is no longer the sample of that index: the loss was reported before.
        """
        if self.sample(index) != sample:
            return False
        del self._samples[index]
        self._lost.append(index)
        return True

    def group_of(self, index: int) -> range:
        """The samples of the same prompt."""
        first = index - index % self.group
        return range(first, first + self.group)

    def sample(self, index: int) -> Any:
        """The accepted sample of an index; None while there is none, or once a checkpoint covers it."""
        return self._samples.get(index, (0, None))[1]

    def put(self, index: int, weight_version: int, sample: Any) -> Answer:
        """Accepts a finished sample, or refuses it and counts the refusal.

        `duplicate`: there is a sample of this index. `stale`: it was decoded with weights that are too old; its index
        stays leased, so its producer must make it again with newer weights.
        """
        if index not in self._leased:
            self.refused["duplicate"] += 1
            return "duplicate"
        if self.round_of(index) - weight_version > self.max_staleness:
            self.refused["stale"] += 1
            return "stale"
        self._leased.remove(index)
        self._samples[index] = (weight_version, sample)
        return "accepted"

    def is_ready(self, round_: int) -> bool:
        """Whether the queue holds every sample of the round."""
        return all(index in self._samples for index in self.indices_of(round_))

    def take_round(self, round_: int) -> list[Any]:
        """The samples of a round in index order. Every learner rank takes the same ones, after a restart again.

        Raises:
            ValueError: a sample of the round is missing, or a checkpoint covers the round.
        """
        if not self.is_ready(round_):
            raise ValueError(f"round {round_} is not ready or no longer kept (committed: {self.committed_rounds})")
        self.taken_rounds.add(round_)
        return [self._samples[index][1] for index in self.indices_of(round_)]

    def staleness(self, round_: int) -> list[int]:
        """For each sample of a ready round: rounds between decoding and training.

        Negative for a sample that was lost and made again with later weights.
        """
        return [round_ - self._samples[index][0] for index in self.indices_of(round_)]

    def published(self, version: int) -> None:
        """Notes that the learner has trained rounds 0 to version - 1. An older version (a restart) changes nothing."""
        self.trained_rounds = max(self.trained_rounds, version)

    def weights_taken(self, version: int) -> None:
        """Notes that the rollout actors hold this version, which frees the slots of the rounds it was trained on.

        Raises:
            ValueError: no such version was published.
        """
        if version > self.trained_rounds:
            raise ValueError(f"version {version} was taken but only {self.trained_rounds} was published")
        self.version = version if self.version is None else max(self.version, version)

    def committed(self, rounds: int) -> None:
        """Notes that a checkpoint covers rounds 0 to rounds - 1, and forgets their samples."""
        self.committed_rounds = max(self.committed_rounds, rounds)
        for index in [i for i in self._samples if self.round_of(i) < self.committed_rounds]:
            del self._samples[index]
        self.taken_rounds = {r for r in self.taken_rounds if r >= self.committed_rounds}
