"""A checkpoint folder on a pool of Ray actors: rollout actors for a student, teacher actors for an AR checkpoint.

The actors and their calls are those of a run, so evaluation scales in the same way. Their weights come from the folder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opdlm.actors.members import stop_actors
from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.actor import start_rollout_actor
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.actor import start_teacher_actor
from opdlm.common.batches import in_groups
from opdlm.common.config.schema import ResourcesConfig, TeacherConfig
from opdlm.common.model.config import read_config
from opdlm.common.model.shards import check_finite, read_shards
from opdlm.common.types import RolloutRequest
from opdlm.deploy.cluster.connection import join_or_start
from opdlm.deploy.cluster.placement import check_demands
from opdlm.deploy.evaluate.decoders import Answers, Decoder, cut_to_limits
from opdlm.deploy.evaluate.options import LoadDtype

_GPU_OPTION = "--gpus-per-actor"
_PARTS_PER_ACTOR = 4
"""Calls per actor for a large set of prompts: few, so that slots are refilled; several, so that no actor idles."""


class ActorDecoder(Decoder):
    """Answers with actors named `eval-0`, `eval-1`, ...; use it as a context manager, which ends them.

    Joins the cluster of RAY_ADDRESS, else starts a local Ray with the CPUs that it needs.
    """

    def __init__(
        self,
        folder: Path,
        actors: int,
        gpus_per_actor: float = 0,
        cpus_per_actor: float = 1,
        block_size: int | None = None,
        dtype: LoadDtype = "auto",
    ) -> None:
        super().__init__(folder.resolve(), block_size)
        check_finite(read_shards(self.folder))  # before Ray starts; each actor would find the same
        self.parallel = actors
        self._dtype: Any = _stored_dtype(folder) if dtype == "auto" else dtype
        resources = ResourcesConfig(local_dashboard=False)
        asked = {
            "CPU": [("--actors", actors, cpus_per_actor)],
            "GPU": [("--actors", actors, gpus_per_actor)],
        }
        join_or_start(resources, asked)
        check_demands(asked, "--actors")
        restarts, path = resources.actor_restarts, str(self.folder)
        if self.is_student:
            handles = {
                name: start_rollout_actor(
                    name, path, self._dtype, cpus_per_actor, gpus_per_actor, restarts, gpu_setting=_GPU_OPTION
                )
                for name in _names(actors)
            }
        else:
            config = TeacherConfig(dtype=self._dtype, cpus_per_actor=cpus_per_actor, gpus_per_actor=gpus_per_actor)
            handles = {name: start_teacher_actor(name, path, config, restarts, _GPU_OPTION) for name in _names(actors)}
        self._pool = ActorPool(handles, resources.call_timeout_seconds, restarts)
        self._runner = asyncio.Runner()  # one event loop for all calls: the pool belongs to it

    def __enter__(self) -> ActorDecoder:
        """Waits until every actor has loaded the folder, so that `Answers.seconds` measures decoding only."""
        arguments: tuple[Any, ...] = ("decode", [], None, self.base, 1) if self.is_student else ("ready",)
        try:
            self._runner.run(self._pool.broadcast(*arguments))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_actors(list(self._pool.actors.values()))
        self._runner.close()

    def answer(self, requests: Sequence[RolloutRequest], settings: DecodeSettings, batch_size: int) -> Answers:
        """See `Decoder`. `Answers.seconds` is the wall time of the whole pool."""
        started = time.perf_counter()
        parts = split(list(requests), self.parallel, batch_size)
        call, answered = self._decode if self.is_student else self._generate, 0

        async def counted(part: list[RolloutRequest]) -> tuple[list[np.ndarray], int]:
            nonlocal answered
            answer = await call(part, settings, batch_size)
            self.on_progress(answered := answered + len(part))
            return answer

        done = self._runner.run(_together([counted(part) for part in parts]))
        responses = [response for part, _ in done for response in part]
        return Answers(responses, sum(steps for _, steps in done), time.perf_counter() - started)

    async def _decode(
        self, part: list[RolloutRequest], settings: DecodeSettings, batch_size: int
    ) -> tuple[list[np.ndarray], int]:
        (decoded,), stats = await self._pool.fetch("decode", part, None, settings, batch_size, outputs=1)
        return [trajectory.response for trajectory in decoded], stats.denoising_steps

    async def _generate(
        self, part: list[RolloutRequest], settings: DecodeSettings, batch_size: int
    ) -> tuple[list[np.ndarray], int]:
        prompts, limit = [r.prompt_ids for r in part], max(r.max_new_tokens for r in part)
        arguments = (prompts, limit, batch_size, settings.temperature, part[0].seed, None, [r.stop for r in part])
        _, (responses, _) = await self._pool.call("generate", *arguments)
        responses = cut_to_limits(responses, part)
        return responses, sum(len(response) for response in responses)


def split(requests: list[RolloutRequest], actors: int, batch_size: int) -> list[list[RolloutRequest]]:
    """Cuts requests into calls: several per actor, at least a batch each, none so large that an actor idles."""
    share = -(-len(requests) // actors)
    size = min(share, max(batch_size, -(-share // _PARTS_PER_ACTOR)))
    return in_groups(requests, size)


async def _together(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


def _names(actors: int) -> list[str]:
    return [f"eval-{i}" for i in range(actors)]


def _stored_dtype(folder: Path) -> Any:
    """The number format of the folder's weights; float32, which holds every float16 value, for other formats."""
    stored = str(read_config(folder).dtype).removeprefix("torch.")
    return stored if stored in ("float32", "bfloat16") else "float32"
