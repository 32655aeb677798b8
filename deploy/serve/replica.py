"""One engine of a server, as a Ray Serve deployment: takes requests as token ids, yields tokens block by block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.exceptions import RayError

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.serving.engine import ServingEngine
from opdlm.common.errors import OpdlmError
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import read_facts
from opdlm.common.types import RolloutRequest
from opdlm.deploy.run.saved_student import is_checkpoint, open_saved_run, saved_student
from opdlm.deploy.serve.options import ServeOptions, check_model
from opdlm.deploy.serve.weights import KEEPER, EngineState, Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the decoder cannot decode."""

    reason: str


class EngineReplica:
    """A `ServingEngine` whose requests are cancelled when Serve cancels their calls.

    It starts with the newest weights of the server, which the keeper knows, and not with those of the first day.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options, self._name = options, serve.get_replica_context().replica_id.unique_id
        newest = first = Weights(options.checkpoint, 0)
        with suppress(RayError, ValueError):  # the keeper is being replaced: the first request brings the newest
            newest = ray.get(serve.get_deployment_actor(KEEPER).newest.remote()) or first
        start = first if is_checkpoint(Path(newest.folder)) or not Path(newest.folder).is_dir() else newest
        facts = read_facts(start.folder)
        check_model(facts, options)
        grid = facts.grid(options.block_size)
        settings = DecodeSettings(
            block_size=grid.block_size,
            block_grid=options.block_grid or grid.kind,
            strategy=options.strategy,
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
            finish_blocks=False,
        )
        device = device_for(options.gpus_per_replica, "--gpus-per-replica")
        self._engine = ServingEngine(
            start.folder,
            settings,
            options.slots,
            options.dtype,
            int(options.cpus_per_replica),
            cache_tokens=options.cache_tokens,
            device=device,
            version=start.version,
        )
        self._weights = start
        self._prepared: tuple[Weights, Mapping[str, torch.Tensor]] | None = None
        self._loading = asyncio.Lock()
        if newest.version > start.version:
            self._engine.take(self._read(newest), newest.version)
            self._weights = newest

    def _read(self, weights: Weights) -> Mapping[str, torch.Tensor]:
        """The state dict of weights that this engine can take.

        Raises:
            OpdlmError: the folder cannot be used, or it is another model.
        """
        folder = Path(weights.folder)
        if self._options.follow is not None and not folder.is_dir():  # the run has removed it meanwhile
            folder = open_saved_run(Path(self._options.follow)).newest().folder
        if not is_checkpoint(folder):
            return self._engine.weights_of(str(folder))
        start, state = saved_student(folder)
        self._engine.check_facts(read_facts(start))
        self._engine.check_weights(state, weights.folder)
        return state

    async def prepare(self, weights: Weights) -> EngineState:
        """Reads weights into the host's memory and checks them, so that `load` cannot fail for what is in the folder.

        The answer says what is wrong with them.
        """
        async with self._loading:
            try:
                self._prepared = weights, await asyncio.to_thread(self._read, weights)
            except OpdlmError as error:
                return EngineState(self._name, self._engine.version, str(error))
        return EngineState(self._name, self._engine.version)

    async def forget(self, weights: Weights) -> None:
        """Frees the memory of weights that were prepared and are not wanted."""
        if self._prepared is not None and self._prepared[0] == weights:
            self._prepared = None

    async def load(self, weights: Weights) -> EngineState:
        """Takes these weights, unless it has newer ones, once what is being decoded has ended.

        Raises:
            OpdlmError: they were not prepared, and the folder cannot be used, or it is another model.
        """
        if weights.version > self._engine.version:
            async with self._loading:
                if weights.version > self._engine.version:
                    await self._take(weights)
        return EngineState(self._name, self._engine.version)

    async def _take(self, weights: Weights) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == weights:
            state = prepared[1]
        else:
            state = await asyncio.to_thread(self._read, weights)
        await _keep(weights)
        await asyncio.to_thread(self._engine.take, state, weights.version)
        self._weights = weights

    async def newest(self) -> Weights:
        """The newest weights of the server that this engine or the keeper knows of."""
        kept = await _kept()
        return self._weights if kept is None or kept.version < self._weights.version else kept

    async def generate(self, request: RolloutRequest, weights: Weights) -> AsyncIterator[Tokens | Refused]:
        """Decodes a request; yields its tokens block by block, or why it cannot be decoded."""
        await self.load(weights)
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Tokens | BaseException]()

        def deliver(part: Tokens | BaseException) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        try:
            index = self._engine.submit(request, deliver)
        except ValueError as error:
            yield _refused(request, error)
            return
        try:
            while True:
                part = await parts.get()
                if isinstance(part, BaseException):
                    raise part
                yield part
                if part.end is not None:
                    return
        finally:
            self._engine.cancel(index)

    async def decode(self, requests: Sequence[RolloutRequest], weights: Weights) -> list[Tokens | Refused]:
        """Decodes requests to their ends; returns all tokens of each, or why it cannot be decoded.

        One call and one answer: a stream costs a message between processes for each block of each response.
        """
        await self.load(weights)
        loop, indices, made = asyncio.get_running_loop(), list[int](), list[asyncio.Future[Tokens | Refused]]()

        def settling(one: asyncio.Future[Tokens | Refused]) -> Callable[[Tokens | BaseException], None]:
            def settle(part: Tokens | BaseException) -> None:
                loop.call_soon_threadsafe(_settle, one, part)

            return settle

        try:
            for request in requests:
                made.append(loop.create_future())
                try:
                    indices.append(self._engine.submit(request, settling(made[-1]), whole=True))
                except ValueError as error:
                    made[-1].set_result(_refused(request, error))
            return list(await asyncio.gather(*made))
        finally:
            for index in indices:
                self._engine.cancel(index)

    async def unfinished(self) -> int:
        """Number of requests that it decodes, or that wait for a slot of it."""
        return self._engine.unfinished


async def _keep(weights: Weights) -> None:
    """Has the keeper remember weights. While it is being replaced, those who have them remember them alone."""
    with suppress(RayError, ValueError):  # ValueError: there is none at the moment
        await serve.get_deployment_actor(KEEPER).keep.remote(weights)


async def _kept() -> Weights | None:
    found: Weights | None = None
    with suppress(RayError, ValueError):
        found = await serve.get_deployment_actor(KEEPER).newest.remote()
    return found


def _refused(request: RolloutRequest, error: ValueError) -> Refused:
    return Refused(str(error).removeprefix(f"prompt {request.prompt_id}: "))


def _settle(one: asyncio.Future[Tokens | Refused], part: Tokens | BaseException) -> None:
    if one.done():  # the call was cancelled
        return
    if isinstance(part, BaseException):
        one.set_exception(part)
    else:
        one.set_result(part)
