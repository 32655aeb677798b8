"""Makes the responses to one request with the engines, and begins anew what an engine that died had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from transformers import PreTrainedTokenizerBase

from opdlm.actors.serving.decoder import Tokens
from opdlm.common.errors import last_line
from opdlm.common.types import RolloutRequest
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.metrics import Metrics
from opdlm.deploy.serve.replica import Refused
from opdlm.deploy.serve.replies import Piece, Usage
from opdlm.deploy.serve.text import TextStream
from opdlm.deploy.serve.weights import Weights

_ATTEMPTS = 5
"""How often a response is begun, if engines die."""
_PAUSE_SECONDS = 0.5
_TOGETHER = 8
"""Most responses of a request that one engine gets in a call. More are shared among the engines."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines, and what a response needs beside them."""

    handle: Any
    """For streams."""
    whole: Any
    """For calls that have one answer."""
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics


async def generate(
    engines: Engines, requests: Sequence[RolloutRequest], weights: Weights, stops: Sequence[str], usage: Usage
) -> AsyncGenerator[Piece]:
    """Yields the pieces of all responses as they come; `Piece.choice` is the place in `requests`. Fills in `usage`.

    Whoever leaves the iteration early cancels all of them.

    Raises:
        ApiError: 400, the decoder refuses a request; 500, it failed; 503, no engine came back in time.
    """
    pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def run(choice: int, request: RolloutRequest) -> None:
        try:
            async for piece in _response(engines, choice, request, weights, stops, usage):
                pieces.put_nowait(piece)
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(run(choice, request)) for choice, request in enumerate(requests)]
    try:
        unfinished = len(tasks)
        while unfinished:
            piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            unfinished -= piece.finish is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()


async def _response(
    engines: Engines,
    choice: int,
    request: RolloutRequest,
    weights: Weights,
    stops: Sequence[str],
    usage: Usage,
) -> AsyncGenerator[Piece]:
    text, steps = TextStream(engines.tokenizer, stops), 0
    usage.prompt_tokens += request.prompt_ids.size
    async with aclosing(_tokens(engines, request, weights)) as parts:
        async for part in parts:
            usage.completion_tokens += len(part.ids)
            usage.denoising_steps += part.denoising_steps - steps
            steps = part.denoising_steps
            if part.step is not None:
                yield Piece(choice, step=part.step)
                continue
            piece = _piece(choice, text, part)
            yield piece
            if piece.finish is not None:
                return


def _piece(choice: int, text: TextStream, part: Tokens) -> Piece:
    new = text.add(part.ids, last=part.end is not None)
    finish = "stop" if text.stopped or part.end == "eos" else part.end
    return Piece(choice, new, list(part.ids), None if part.logprobs is None else list(part.logprobs), finish)


async def _tokens(engines: Engines, request: RolloutRequest, weights: Weights) -> AsyncGenerator[Tokens]:
    """The tokens of one response.

    The same request gives the same tokens with the same weights, so a new engine goes on where one died. If it has
    other weights and some tokens or steps were sent, the response ends with an error, since its parts would not belong
    together.
    """
    seen, told, version = 0, 0, weights.version
    for attempt in range(1, _ATTEMPTS + 1):
        stream, place = engines.handle.generate.remote(request, weights), 0
        try:
            async for part in stream:
                if isinstance(part, Refused):
                    raise ApiError(400, part.reason, "context_length_exceeded")
                if (seen or told) and part.weight_version != version:
                    raise ApiError(503, "the engine died, and other weights are served by now; ask again", "reloaded")
                version = part.weight_version
                skipped = min(max(seen - place, 0), len(part.ids))
                place += len(part.ids)
                if part.step is not None:
                    if part.step.number > told:
                        told = part.step.number
                        yield part
                elif skipped < len(part.ids) or part.end is not None:
                    seen = max(seen, place)
                    kept = None if part.logprobs is None else part.logprobs[skipped:]
                    yield Tokens(part.ids[skipped:], kept, part.denoising_steps, part.end, part.weight_version)
            return
        except RayActorError as error:
            await _died(engines, attempt, error)
        except RayTaskError as error:
            raise _failed(error) from None
        finally:
            with suppress(Exception):  # it may have ended, or its engine died
                stream.cancel()


async def generate_whole(
    engines: Engines, requests: Sequence[RolloutRequest], weights: Weights, stops: Sequence[str], usage: Usage
) -> AsyncGenerator[Piece]:
    """Does what `generate` does with fewer messages between processes; each response is one piece.

    Stop strings cut responses when these are whole: where there are some, `generate` ends them earlier.
    """
    groups = [requests[first : first + _TOGETHER] for first in range(0, len(requests), _TOGETHER)]
    tasks = [asyncio.create_task(_decode(engines, group, weights)) for group in groups]
    try:
        found = [part for parts in await asyncio.gather(*tasks) for part in parts]
    finally:
        for task in tasks:
            task.cancel()
    for choice, (request, part) in enumerate(zip(requests, found, strict=True)):
        if isinstance(part, Refused):
            raise ApiError(400, part.reason, "context_length_exceeded")
        text = TextStream(engines.tokenizer, stops)
        usage.prompt_tokens += request.prompt_ids.size
        usage.completion_tokens += len(part.ids)
        usage.denoising_steps += part.denoising_steps
        yield _piece(choice, text, part)


async def _decode(engines: Engines, requests: Sequence[RolloutRequest], weights: Weights) -> list[Tokens | Refused]:
    """The whole responses to some requests, from one engine, or from the next one where it dies."""
    attempt = 0
    while True:
        attempt += 1
        call = engines.whole.decode.remote(requests, weights)
        try:
            return list(await call)
        except RayActorError as error:
            await _died(engines, attempt, error)
        except RayTaskError as error:
            raise _failed(error) from None
        finally:
            with suppress(Exception):  # it may have ended, or its engine died
                call.cancel()


async def _died(engines: Engines, attempt: int, error: RayActorError) -> None:
    """Waits before the next attempt; after the last one, raises `ApiError` 503."""
    if attempt == _ATTEMPTS:
        raise ApiError(503, f"the engines died {_ATTEMPTS} times: {last_line(error)}", "no_engine") from None
    engines.metrics.retries.inc()
    await asyncio.sleep(_PAUSE_SECONDS * attempt)


def _failed(error: RayTaskError) -> ApiError:
    return ApiError(500, f"the engine failed: {last_line(error.cause or error)}", "engine_failed")
