"""A server in this process: the real `Api` and engine behind uvicorn; plain calls take the place of Serve's handle."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvicorn
from ray.exceptions import ActorDiedError
from starlette.requests import Request

from opdlm.deploy.serve import replica
from opdlm.deploy.serve.api import Api
from opdlm.deploy.serve.options import ServeOptions
from tests.patience import wait_until


class _NoServe:
    """What an engine asks Serve for, outside of it: its name, and the keeper of the weights, which is not there."""

    @staticmethod
    def get_replica_context() -> Any:
        return SimpleNamespace(replica_id=SimpleNamespace(unique_id="here"))

    @staticmethod
    def get_deployment_actor(name: str) -> Any:
        raise ValueError(name)


@contextmanager
def outside_serve() -> Iterator[None]:
    """Engines of this process do without Serve."""
    with mock.patch.object(replica, "serve", _NoServe):
        yield


class Call:
    """What Serve's handle returns for a call: an awaitable, or a stream, that can be cancelled."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self._task: asyncio.Future[Any] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        self._task = asyncio.ensure_future(self._made)
        return self._task.__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._made  # type: ignore[no-any-return]

    def cancel(self) -> None:
        if isinstance(self._made, AsyncGenerator):
            self._task = asyncio.ensure_future(self._made.aclose())
        elif self._task is not None:
            self._task.cancel()


class Method:
    """A method of Serve's handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call, self.calls = call, 0

    def remote(self, *arguments: Any) -> Call:
        self.calls += 1
        return Call(self._call(*arguments))


class _Answers:
    """What Serve's handle returns for a call to all engines, of which there is one."""

    def __init__(self, one: Awaitable[Any]) -> None:
        self._one = one

    async def results_async(self, return_exceptions: bool) -> list[Any]:
        return list(await asyncio.gather(self._one, return_exceptions=return_exceptions))


class _Handle:
    """Serve's handle of one engine.

    Args:
        deaths: after how many parts the engine dies in each of the first streams; in further ones it lives.
    """

    def __init__(self, engine: replica.EngineReplica, deaths: Sequence[int]) -> None:
        self._engine, self._deaths = engine, list(deaths)
        self.generate, self.decode = Method(self._generate), Method(engine.decode)

    async def _generate(self, *arguments: Any) -> AsyncGenerator[Any]:
        last = self._deaths.pop(0) if self._deaths else None
        async with aclosing(self._engine.generate(*arguments)) as parts:
            async for part in parts:
                if last == 0:
                    raise ActorDiedError
                last = None if last is None else last - 1
                yield part

    def broadcast(self, method: str, *arguments: Any) -> _Answers:
        return _Answers(getattr(self._engine, method)(*arguments))

    def options(self, **_: Any) -> _Handle:
        return self


@contextmanager
def local_server(options: ServeOptions, deaths: Sequence[int] = ()) -> Iterator[str]:
    """Runs a server; gives its address. `deaths`: see `_Handle`."""
    with outside_serve(), socket.socket() as listening:
        engine = replica.EngineReplica(options)
        api: Api | None = None

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal api
            api = api or Api(options, _Handle(engine, deaths))
            response = await api(Request(scope, receive))
            await response(scope, receive, send)

        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the server")
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
