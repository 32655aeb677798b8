"""Gives all engines other weights, or none of them.

prepare: each engine reads and checks the folder ──one cannot──► forget: nothing changes, the reason is told
    │ all can
    ▼
load: the keeper remembers them; each engine takes them once what it decodes has ended

An engine that starts meanwhile gets them from the keeper, or with the first request that names them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from opdlm.common.errors import OpdlmError, last_line
from opdlm.deploy.run.saved_student import SavedRun
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.metrics import Metrics
from opdlm.deploy.serve.weights import EngineState, Weights

log = logging.getLogger("opdlm.serve")

_PAUSE_SECONDS = 0.5


class Reloading:
    """The weights that a server has, and how it gets others.

    Args:
        engines: Serve's handle of the engines.
        first: the weights that it starts with, unless engines have newer ones, because this process is a new one.
    """

    def __init__(self, engines: Any, first: Weights, metrics: Metrics) -> None:
        self.current = first
        """The weights of requests that come now."""
        self._engines, self._metrics = engines, metrics
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[int]] = set()

    async def find(self) -> None:
        """Asks the engines for the newest weights. Waits until there is an engine."""
        while True:
            try:
                found = [weights for weights in await self._all("newest") if isinstance(weights, Weights)]
            except DeploymentUnavailableError:
                found = []
            if found:
                self.current = max([self.current, *found], key=lambda weights: weights.version)
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def to(self, folder: str, mark: str = "") -> int:
        """Gives all engines the weights of a folder. It goes on where the caller is cancelled.

        Returns: number of engines that have them.

        Raises:
            ApiError: 400, an engine cannot use the folder, and none has changed; 503, there is no engine, or some did
                not take the weights, while the others did.
        """
        task = asyncio.create_task(self._to(folder, mark))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _to(self, folder: str, mark: str) -> int:
        async with self._lock:
            try:
                count = await self._prepare_and_load(Weights(folder, self.current.version + 1, mark))
            except DeploymentUnavailableError:
                self._metrics.reloads.labels("refused").inc()
                raise ApiError(503, "there is no engine at the moment; the old weights stay", "no_engine") from None
            except ApiError as error:
                self._metrics.reloads.labels("refused" if error.status == 400 else "incomplete").inc()
                raise
        self._metrics.reloads.labels("done").inc()
        return count

    async def _prepare_and_load(self, weights: Weights) -> int:
        problems = _problems(await self._all("prepare", weights))
        if problems:
            await self._all("forget", weights)
            raise ApiError(400, f"the old weights stay: {'; '.join(problems)}", "reload_failed")
        self.current = weights
        states = await self._all("load", weights)
        if problems := _problems(states):
            lack = f"{len(problems)} of {len(states)} engines did not take the weights of {weights.folder}"
            raise ApiError(503, f"{lack}: {'; '.join(problems)}", "reload_incomplete")
        return sum(isinstance(state, EngineState) for state in states)

    async def _all(self, method: str, *given: Any) -> list[Any]:
        """What all running engines return, or raise. One that dies is started anew by Serve, with the newest weights.

        Raises:
            DeploymentUnavailableError: no engine runs.
        """
        return list(await self._engines.broadcast(method, *given).results_async(return_exceptions=True))


def _problems(answers: list[Any]) -> list[str]:
    """What engines could not do, in words; one that died is none: another one takes its place."""
    found = []
    for answer in answers:
        if isinstance(answer, EngineState) and answer.problem is not None:
            found.append(f"engine {answer.engine}: {answer.problem}")
        elif isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
            found.append(last_line(getattr(answer, "cause", None) or answer))
    return found


class Follower:
    """Has a server take a training run's newest weights, as they appear in its directory."""

    def __init__(self, run: SavedRun, seconds: float, reloading: Reloading) -> None:
        self._run, self._seconds, self._reloading = run, seconds, reloading
        self._said = ""

    async def look(self) -> None:
        """Looks once, and takes what is new. What hinders it is logged, and tried again at the next look."""
        try:
            found = await asyncio.to_thread(self._run.newest)
            now = self._reloading.current
            if str(found.folder) != now.folder or now.mark not in ("", found.mark):  # empty: the engines' start
                await self._reloading.to(str(found.folder), found.mark)
                log.info("serving %s as version %d", found.folder, self._reloading.current.version)
            self._said = ""
        except (OpdlmError, ApiError, OSError) as error:
            if (text := str(error)) != self._said:  # once, not at every look
                log.warning("--follow %s: %s; trying again every %g s", self._run.folder, text, self._seconds)
            self._said = text

    async def run(self) -> None:
        """Looks again and again."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.look()
