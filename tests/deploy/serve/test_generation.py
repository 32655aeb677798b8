"""Streams and whole answers of one engine in this process, without Ray. `pytest tests/deploy/serve`"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from opdlm.actors.rollout.observation import Step
from opdlm.actors.serving.decoder import Tokens
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import RolloutRequest
from opdlm.deploy.serve import generation
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.generation import Engines, generate, generate_whole
from opdlm.deploy.serve.metrics import Metrics
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.replica import EngineReplica
from opdlm.deploy.serve.replies import Piece, Usage
from opdlm.deploy.serve.weights import Weights
from tests.deploy.serve.local_server import Method, outside_serve
from tests.tiny import save_teacher


class Handle:
    """Calls an engine in this process; the first `deaths` calls find it dead."""

    def __init__(self, replica: EngineReplica, deaths: int = 0) -> None:
        self.replica, self.deaths = replica, deaths
        self.generate, self.decode = Method(replica.generate), Method(self._decode)

    @property
    def calls(self) -> int:
        return self.generate.calls + self.decode.calls

    async def _decode(self, *args: Any) -> Any:
        self.deaths -= 1
        if self.deaths >= 0:
            raise ActorDiedError()
        return await self.replica.decode(*args)


@pytest.fixture(scope="module", params=["student", "autoregressive"])
def folder(request, tmp_path_factory) -> Path:
    """A tiny student, or an autoregressive model."""
    root = tmp_path_factory.mktemp("served")
    teacher = save_teacher(root / "teacher", context=256)
    if request.param == "autoregressive":
        return teacher
    convert_checkpoint(teacher, root / "student", block_size=4, block_grid="absolute")
    return root / "student"


@pytest.fixture(scope="module")
def replica(folder) -> Iterator[EngineReplica]:
    with outside_serve():
        yield EngineReplica(ServeOptions(checkpoint=str(folder), slots=4))


def engines_of(replica: EngineReplica, folder: Path, deaths: int = 0) -> Engines:
    handle = Handle(replica, deaths)
    return Engines(handle, handle, load_tokenizer(folder), Metrics())


def requests(count: int, limit: int = 12) -> list[RolloutRequest]:
    """Requests that sample, of mixed lengths."""
    prompts = [np.arange(3, 6 + n % 5, dtype=np.int32) for n in range(count)]
    return [RolloutRequest(0, "test", ids, limit + n, n, sampling=(1.0, 0.9)) for n, ids in enumerate(prompts)]


def collect(make: Any, engines: Engines, folder: Path, asked: list[RolloutRequest]) -> tuple[list[Piece], Usage]:
    """Each response in one piece, and the usage."""
    usage, whole = Usage(), [Piece(n) for n in range(len(asked))]

    async def run() -> None:
        async for piece in make(engines, asked, Weights(str(folder), 0), (), usage):
            one = whole[piece.choice]
            one.text, one.ids, one.finish = one.text + piece.text, one.ids + piece.ids, piece.finish
            one.logprobs = (one.logprobs or []) + (piece.logprobs or [])

    asyncio.run(asyncio.wait_for(run(), 300))
    return whole, usage


def test_whole_answers_are_those_of_streams_in_fewer_calls(replica, folder) -> None:
    engines, asked = engines_of(replica, folder), requests(10)
    streamed = collect(generate, engines, folder, asked)
    assert engines.handle.calls == 10
    assert collect(generate_whole, engines, folder, asked) == streamed
    assert engines.handle.calls == 10 + 2
    assert len({piece.text for piece in streamed[0]}) > 1


def test_an_engine_that_dies_is_asked_again(replica, folder, monkeypatch) -> None:
    monkeypatch.setattr(generation, "_PAUSE_SECONDS", 0.0)
    calm = collect(generate_whole, engines_of(replica, folder), folder, requests(3))
    assert collect(generate_whole, engines_of(replica, folder, deaths=4), folder, requests(3)) == calm
    with pytest.raises(ApiError, match="the engines died 5 times") as failed:
        collect(generate_whole, engines_of(replica, folder, deaths=5), folder, requests(3))
    assert failed.value.status == 503


@pytest.mark.parametrize(
    "sent", [Tokens((3, 4), None, 2), Tokens((), None, 1, step=Step(1, (0,), (3,), (True,), None))]
)
@pytest.mark.parametrize("version", [0, 1])
def test_a_stream_goes_on_with_the_weights_it_began_with_or_ends(folder, sent, version, monkeypatch) -> None:
    monkeypatch.setattr(generation, "_PAUSE_SECONDS", 0.0)
    calls = []

    async def parts(request: RolloutRequest, weights: Weights) -> AsyncIterator[Tokens]:
        calls.append(request)
        if len(calls) == 1:
            yield sent
            raise ActorDiedError
        yield Tokens((3, 4, 5, 6), None, 4, "length", version)

    engine = SimpleNamespace(generate=Method(parts))
    engines = Engines(engine, engine, load_tokenizer(folder), Metrics())
    if version == 0:
        assert collect(generate, engines, folder, requests(1))[0][0].ids == [3, 4, 5, 6]
        return
    with pytest.raises(ApiError, match="other weights are served by now") as ended:
        collect(generate, engines, folder, requests(1))
    assert (ended.value.status, ended.value.code) == (503, "reloaded")


def test_a_request_that_does_not_fit_is_refused_and_frees_the_others(replica, folder) -> None:
    asked = [*requests(3, limit=100), *requests(1, limit=1000)]
    for make in (generate, generate_whole):
        with pytest.raises(ApiError, match="the model's context is 256") as refused:
            collect(make, engines_of(replica, folder), folder, asked)
        assert refused.value.status == 400
    collect(generate_whole, engines_of(replica, folder), folder, requests(1))
    assert asyncio.run(replica.unfinished()) == 0


def test_who_leaves_cancels_all_responses(replica, folder) -> None:
    async def leave() -> int:
        made = generate_whole(
            engines_of(replica, folder), requests(12, limit=180), Weights(str(folder), 0), (), Usage()
        )
        first = asyncio.ensure_future(anext(made))
        while await replica.unfinished() == 0:
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for _ in range(10):  # the cancellation goes through two tasks
            await asyncio.sleep(0)
        return await replica.unfinished()

    assert asyncio.run(leave()) == 0
