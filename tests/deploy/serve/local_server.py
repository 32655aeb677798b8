"""A server in this process: the real `Api` and engines behind uvicorn, with Serve's handle replaced by plain calls."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import uvicorn
from ray.exceptions import ActorDiedError
from starlette.requests import Request

from opdlm.deploy.serve.api import Api
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.replica import EngineReplica
from tests.patience import wait_until


class _Stream:
    """What Serve's handle returns for a call that yields."""

    def __init__(self, parts: AsyncGenerator[Any]) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._parts

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._parts.aclose())


class _Method:
    def __init__(self, call: Callable[..., AsyncGenerator[Any]]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> _Stream:
        return _Stream(self._call(*arguments))


class _Handle:
    """Serve's handle of one engine.

    Args:
        deaths: after how many parts the engine dies in each of the first calls; in further ones it lives.
    """

    def __init__(self, replica: EngineReplica, deaths: Sequence[int]) -> None:
        self._replica, self._deaths = replica, list(deaths)
        self.generate = _Method(self._generate)

    async def _generate(self, *arguments: Any) -> AsyncGenerator[Any]:
        last = self._deaths.pop(0) if self._deaths else None
        async with aclosing(self._replica.generate(*arguments)) as parts:
            async for part in parts:
                if last == 0:
                    raise ActorDiedError
                last = None if last is None else last - 1
                yield part

    def options(self, **_: Any) -> _Handle:
        return self


@contextmanager
def local_server(options: ServeOptions, deaths: Sequence[int] = ()) -> Iterator[str]:
    """Runs a server; gives its address. `deaths`: see `_Handle`."""
    engine = EngineReplica(options)
    api: Api | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal api
        api = api or Api(options, _Handle(engine, deaths))
        response = await api(Request(scope, receive))
        await response(scope, receive, send)

    with socket.socket() as listening:
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
