"""Teacher actor: the frozen AR teacher behind Ray. It scores trajectories and generates responses of its own.

Its responses are the first row of the evaluation, and the given responses of the offline objectives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from opdlm.actors.engine_guard import guarded
from opdlm.actors.progress import BatchCount, Watch
from opdlm.actors.teacher.backends import make_backend
from opdlm.common.batches import in_groups
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.model.device import device_for
from opdlm.common.types import ScoredTrajectory, Trajectory


@dataclass(frozen=True, slots=True)
class ScoreStats:
    """Counts and times of one scoring call."""

    tokens: int
    """Response tokens scored."""
    forward_tokens: int
    """Tokens that went through the teacher."""
    seconds: float
    nbytes: int
    """Bytes of targets that travel to the learner."""
    lengths: tuple[tuple[int, int], ...] = ()
    """(prompt tokens, response tokens) of each trajectory."""
    room_tokens: int = 0
    """Tokens that the teacher's forwards had room for: `teacher.batch_tokens` each, or one longer trajectory."""


class TeacherActor:
    """A teacher backend in a Ray actor."""

    def __init__(self, folder: str, config: TeacherConfig, gpu_setting: str = "teacher.gpus_per_actor") -> None:
        if device_for(config.gpus_per_actor, gpu_setting) == "cpu" and config.backend == "vllm":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # vLLM takes whatever GPU it sees
        torch.set_num_threads(max(int(config.cpus_per_actor), 1))
        self._backend, self._batch_tokens = make_backend(folder, config), config.batch_tokens

    def ready(self) -> None:
        """Returns once the teacher is loaded."""

    def score(
        self,
        places: Sequence[tuple[int, int]],
        per_reference: int,
        watch: Watch | None,
        *groups: Sequence[Trajectory],
    ) -> tuple[list[ScoredTrajectory] | ScoreStats, ...]:
        """Scores trajectories. If one fails, the call fails: a score is never made up (METHOD.md section 3).

        Args:
            places: of each trajectory, the number of the list that it is in and its index in that list.
            watch: is told how far the call has come.
            groups: the lists. Where the caller has references, Ray fetches what they refer to.

        Returns: one list of scored trajectories for each `per_reference` trajectories, in order, and last the
        `ScoreStats`. Ray makes one object reference of each.
        """
        trajectories = [groups[group][place] for group, place in places]
        started = time.perf_counter()
        with guarded("teacher", self._backend.probe):
            told = BatchCount(watch, [t.index for t in trajectories], [t.response_length for t in trajectories])
            room = 0

            def on_batch(places: Sequence[int]) -> None:
                nonlocal room
                room += max(self._batch_tokens, max(sum(trajectories[place].lengths) - 1 for place in places))
                told(places)

            targets = self._backend.score(trajectories, on_batch)
        scored = [ScoredTrajectory(t, target) for t, target in zip(trajectories, targets, strict=True)]
        arrays = [getattr(target, field) for target in targets for field in type(target).__slots__]
        nbytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        lengths = tuple(t.lengths for t in trajectories)
        tokens = sum(response for _, response in lengths)
        forward_tokens = tokens + sum(prompt - 1 for prompt, _ in lengths)
        stats = ScoreStats(tokens, forward_tokens, time.perf_counter() - started, nbytes, lengths, room)
        return (*in_groups(scored, per_reference), stats)

    def generate(
        self,
        prompts: list[np.ndarray],
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
        watch: Watch | None = None,
        stops: Sequence[Sequence[str]] = (),
    ) -> tuple[list[np.ndarray], float]:
        """Responses `[R] int32` to each prompt (greedy at temperature 0), and the seconds that they took.

        `stops`: see `TeacherBackend`.
        """
        started = time.perf_counter()
        with guarded("teacher", self._backend.probe):
            told = BatchCount(watch, range(len(prompts)), ())
            responses = self._backend.generate(prompts, max_new_tokens, batch_size, temperature, seed, told, stops)
        return responses, time.perf_counter() - started


def start_teacher_actor(
    name: str,
    folder: str,
    config: TeacherConfig,
    restarts: int,
    gpu_setting: str = "teacher.gpus_per_actor",
    **placement: Any,
) -> Any:
    """Starts a `TeacherActor` and returns its handle; the pool repeats a call that dies with an actor.

    Args:
        name: name of the Ray actor.
        folder: folder of the teacher model.
        restarts: how often Ray may restart the actor.
        gpu_setting: what says the actor's share of GPUs, for errors.
        placement: more of Ray's actor options, which place it on a node.
    """
    actor = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor, max_restarts=restarts)(
        TeacherActor
    )
    return actor.options(name=name, **placement).remote(folder, config, gpu_setting)
