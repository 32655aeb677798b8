"""One engine of a server, as a Ray Serve deployment: takes requests as token ids, yields tokens block by block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.serving.engine import ServingEngine
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import read_facts
from opdlm.common.types import RolloutRequest
from opdlm.deploy.serve.options import ServeOptions, check_model


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a request is decoded with, or newer ones. A restarted engine thus gets them by itself."""

    folder: str
    version: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the decoder cannot decode."""

    reason: str


class EngineReplica:
    """A `ServingEngine` whose requests are cancelled when Serve cancels their calls."""

    def __init__(self, options: ServeOptions) -> None:
        facts = read_facts(options.checkpoint)
        check_model(facts, options)
        grid = facts.grid(options.block_size)
        settings = DecodeSettings(
            block_size=grid.block_size,
            block_grid=grid.kind,
            strategy=options.strategy,
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        device = device_for(options.gpus_per_replica, "--gpus-per-replica")
        self._engine = ServingEngine(
            options.checkpoint,
            settings,
            options.slots,
            options.dtype,
            int(options.cpus_per_replica),
            cache_tokens=options.cache_tokens,
            device=device,
        )

    async def load(self, weights: Weights) -> int:
        """Takes these weights, unless it has newer ones; returns the version that it has. See `ServingEngine.reload`.

        Raises:
            OpdlmError: the folder cannot be used, or it is another model.
        """
        if weights.version > self._engine.version:
            await asyncio.to_thread(self._engine.reload, weights.folder, weights.version)
        return self._engine.version

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


def _refused(request: RolloutRequest, error: ValueError) -> Refused:
    return Refused(str(error).removeprefix(f"prompt {request.prompt_id}: "))


def _settle(one: asyncio.Future[Tokens | Refused], part: Tokens | BaseException) -> None:
    if one.done():  # the call was cancelled
        return
    if isinstance(part, BaseException):
        one.set_exception(part)
    else:
        one.set_result(part)
