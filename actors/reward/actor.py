"""Reward actor: the responses of a group in, their rewards and advantages out (METHOD.md section 7)."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from opdlm.actors.reward.time_limit import TookTooLong, time_limit
from opdlm.common.config.method import Advantage
from opdlm.common.config.reward import RewardConfig
from opdlm.common.data.reranking import Failure, Reference, RerankCase, read_answer
from opdlm.common.errors import OpdlmError
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.rewards import Attempt, advantages, make_reward
from opdlm.common.types import PolicyTargets, ScoredTrajectory, TeacherTargets, Trajectory


@dataclass(frozen=True, slots=True)
class RewardStats:
    """What one call said."""

    rewards: tuple[float, ...]
    """Of each response."""
    is_equal: bool
    """Whether all rewards of the group are equal, so that it is left out."""
    failures: tuple[Failure, ...]
    """Of the invalid answers of a re-ranking case."""
    seconds: float


class RewardActor:
    """A reward in a Ray actor.

    Args:
        student: folder of the student, whose tokenizer reads the responses.
        config: which reward.
        advantage: how rewards become advantages.
    """

    def __init__(self, student: str, config: RewardConfig, advantage: Advantage) -> None:
        self._tokenizer = load_tokenizer(student)
        self._config, self._advantage = config, advantage
        self._reward = make_reward(config)

    def ready(self) -> None:
        """Returns once the reward can be asked."""

    def judge(
        self,
        places: Sequence[tuple[int, int]],
        reference: Reference | None,
        others: Sequence[float],
        *lists: Sequence[Trajectory | ScoredTrajectory],
    ) -> tuple[list[ScoredTrajectory], RewardStats]:
        """Gives responses to one prompt their advantages. What a teacher has scored keeps its targets.

        Args:
            places: of each response, (which of the lists, index in it).
            reference: what the data says of the prompt.
            others: rewards of the group's other responses, which were judged before.

        Raises:
            OpdlmError: the reward failed, took too long, or is no finite number; the sample is named.
        """
        started = time.perf_counter()
        pairs = [_parts(lists[number][place]) for number, place in places]
        group = [trajectory for trajectory, _ in pairs]
        attempts = [self._attempt(trajectory, reference) for trajectory in group]
        rewards = [self._ask(attempt, t.index) for attempt, t in zip(attempts, group, strict=True)]
        found = advantages([*rewards, *others], self._advantage)
        targets = [
            PolicyTargets(None if found is None else float(found[i]), teacher=teacher)
            for i, (_, teacher) in enumerate(pairs)
        ]
        failures: list[Failure] = []
        if isinstance(reference, RerankCase):
            answers = [read_answer(reference, attempt.response, attempt.has_ended) for attempt in attempts]
            failures = [answer.failure for answer in answers if answer.failure is not None]
        samples = [ScoredTrajectory(t, target) for t, target in zip(group, targets, strict=True)]
        seconds = time.perf_counter() - started
        return samples, RewardStats(tuple(rewards), found is None, tuple(failures), seconds)

    def _attempt(self, trajectory: Trajectory, reference: Reference | None) -> Attempt:
        has_ended = trajectory.finish_reason == "eos"
        response = trajectory.response[:-1] if has_ended else trajectory.response
        # Special tokens are shown: what the model wrote is judged, not what is left of it.
        prompt, text = (self._tokenizer.decode(ids) for ids in (trajectory.prompt_ids, response))
        return Attempt(trajectory.prompt_id, prompt, text, has_ended, reference)

    def _ask(self, attempt: Attempt, index: int) -> float:
        where = f"reward: sample {index} ({attempt.prompt_id})"
        limit = self._config.time_limit_seconds
        try:
            with time_limit(limit):
                value = self._reward(attempt)
        except TookTooLong:
            raise OpdlmError(
                f"{where}: the reward took more than reward.time_limit_seconds {limit:g}; make it faster, or raise it"
            ) from None
        except (Exception, SystemExit) as error:  # the function is the user's: it may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            name = self._config.function or f"reward.kind `{self._config.kind}`"
            raise OpdlmError(
                f"{where}: {name}: {type(error).__name__}: {error} (line {place.lineno} of {place.filename})"
            ) from error
        if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            return float(value)
        raise OpdlmError(f"{where}: {self._config.function} returned {value!r}; expected a finite number")


def _parts(one: Trajectory | ScoredTrajectory) -> tuple[Trajectory, TeacherTargets | None]:
    """The trajectory, and the teacher's targets if it is scored."""
    if isinstance(one, Trajectory):
        return one, None
    assert not isinstance(one.targets, PolicyTargets), "judged once"
    return one.trajectory, one.targets


def start_reward_actor(
    name: str, student: str, config: RewardConfig, advantage: Advantage, restarts: int, **placement: Any
) -> Any:
    """Starts a `RewardActor` and returns its handle; the pool repeats a call that dies with an actor.

    Args:
        name: name of the Ray actor.
        restarts: how often Ray may restart the actor.
        placement: more of Ray's actor options, which place it on a node.
    """
    actor = ray.remote(num_cpus=config.cpus_per_actor, max_restarts=restarts)(RewardActor)
    return actor.options(name=name, **placement).remote(student, config, advantage)
