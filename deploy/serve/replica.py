"""One engine of a server, as a Ray Serve deployment: takes requests as token ids, yields tokens block by block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.serving.engine import ServingEngine
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import read_facts
from opdlm.common.types import RolloutRequest
from opdlm.deploy.serve.options import ServeOptions


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
        grid = read_facts(options.checkpoint).grid(options.block_size)
        settings = DecodeSettings(
            block_size=grid.block_size,
            block_grid=grid.kind,
            strategy=options.strategy,
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
            finish_blocks=False,
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
            yield Refused(str(error).removeprefix(f"prompt {request.prompt_id}: "))
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

    async def unfinished(self) -> int:
        """Number of requests that it decodes, or that wait for a slot of it."""
        return self._engine.unfinished
