"""The HTTP side of a server, as a Ray Serve deployment: checks requests, and turns text to tokens and back."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.run.saved_student import open_saved_run
from opdlm.deploy.serve.admission import Admission
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.generation import Engines, generate, generate_whole
from opdlm.deploy.serve.keys import check_key, check_origin, read_keys
from opdlm.deploy.serve.metrics import Metrics
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.page import described, show_page
from opdlm.deploy.serve.prompts import Prompts
from opdlm.deploy.serve.reloading import Follower, Reloading
from opdlm.deploy.serve.replies import Piece, Replies, Usage
from opdlm.deploy.serve.schema import ChatRequest, CompletionRequest, read_request
from opdlm.deploy.serve.weights import Weights

_OPEN = ("/", "/health")
"""Paths that need no key."""
_JSON = "application/json"


class Api:
    """Answers HTTP requests. There is one of it; engines do the work.

    Args:
        engines: Serve's handle of the `EngineReplica`s.
    """

    def __init__(self, options: ServeOptions, engines: Any) -> None:
        self._options, self._name = options, options.name or Path(options.checkpoint).name
        self._keys = read_keys(options.api_key_file)
        self._created = int(time.time())
        self._metrics, self._admission = Metrics(), Admission(options.max_requests)
        self._tokenizer = load_tokenizer(options.checkpoint)
        facts = read_facts(options.checkpoint)
        self._prompts = Prompts(options, facts, self._tokenizer)
        self._about = described(options, facts, self._tokenizer)
        self._reloading = Reloading(engines, Weights(options.checkpoint, 0), self._metrics)
        self._starting, self._started = asyncio.Lock(), False
        self._following: asyncio.Task[None] | None = None
        self._engines = Engines(engines.options(stream=True), engines, self._tokenizer, self._metrics)
        self._routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("GET", "/"): show_page,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._show_metrics,
            ("GET", "/v1/models"): self._models,
            ("GET", f"/v1/models/{self._name}"): self._model,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/admin/reload"): self._reload,
        }

    async def check_health(self) -> None:
        """Ray Serve asks before the first request, and then regularly. The first time, it finds the newest weights.

        Raises:
            OpdlmError: nothing looks after the run any more that the server is to follow.
        """
        if self._following is not None and self._following.done():
            raise OpdlmError(f"following {self._options.follow} has ended: {self._following.exception()!r}")
        async with self._starting:
            if self._started:
                return
            await self._reloading.find()
            if self._options.follow is not None:
                run = open_saved_run(Path(self._options.follow))
                follower = Follower(run, self._options.follow_seconds, self._reloading)
                await follower.look()
                self._following = asyncio.create_task(follower.run())
            self._started = True

    async def drain(self) -> int:
        """Takes no more requests from now on; returns the number of responses that are still made."""
        self._admission.draining = True
        return self._admission.active

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        started, path = time.monotonic(), request.url.path
        route = self._routes.get((request.method, path))
        try:
            if path not in _OPEN:
                check_key(self._keys, request.headers.get("authorization", ""), request.client and request.client.host)
                check_origin(self._keys, request.headers.get("origin"), request.headers.get("host", ""))
            if route is None:
                raise ApiError(404, f"there is no {request.method} {path} here", "not_found")
            response = await route(request)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers())
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            raise
        self._metrics.requests.labels(path if route else "other", response.status_code).inc()
        if response.status_code == 200 and request.method == "POST" and not isinstance(response, StreamingResponse):
            self._metrics.seconds.observe(time.monotonic() - started)
        return response

    async def _body(self, request: Request) -> bytes:
        most = self._options.max_body_bytes
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request's body is larger than {most} bytes", "too_large")
        return body

    async def _health(self, request: Request) -> Response:
        draining = self._admission.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def _show_metrics(self, request: Request) -> Response:
        self._metrics.active.set(self._admission.active)
        self._metrics.version.set(self._reloading.current.version)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        now = self._reloading.current
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "opdlm"}
        return model | {"checkpoint": now.folder, "weight_version": now.version} | self._about

    async def _completions(self, request: Request) -> Response:
        return await self._answer(read_request(CompletionRequest, await self._body(request)))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(read_request(ChatRequest, await self._body(request)))

    async def _answer(self, given: CompletionRequest | ChatRequest) -> Response:
        if given.model != self._name:
            raise ApiError(
                404, f"model: found {given.model!r}; this server has {self._name!r}", "model_not_found", "model"
            )
        requests, echoes = self._prompts.requests(given, secrets.randbits(62))
        replies = Replies(self._name, self._tokenizer, isinstance(given, ChatRequest), given.wants_logprobs)
        usage, until = Usage(), asyncio.get_running_loop().time() + self._options.request_seconds

        async def pieces() -> AsyncGenerator[Piece]:
            """The pieces of all responses, within the time limit."""
            make = generate if given.stream or given.stops else generate_whole
            made = make(self._engines, requests, self._reloading.current, given.stops, usage)
            with self._admission.admit(len(requests)):
                try:
                    while True:
                        async with asyncio.timeout_at(until):
                            piece = await anext(made)
                        yield piece
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    limit = f"the request took longer than {self._options.request_seconds:g} s"
                    raise ApiError(503, limit, "timeout") from None
                finally:
                    await made.aclose()
                    self._count(usage)

        if given.stream:
            return await self._streamed(pieces(), replies, usage, echoes, given.wants_usage)
        whole = [Piece(n, text, [], [] if given.wants_logprobs else None) for n, text in enumerate(echoes)]
        async with aclosing(pieces()) as made:
            async for piece in made:
                one = whole[piece.choice]
                one.text, one.ids, one.finish = one.text + piece.text, one.ids + piece.ids, piece.finish
                one.logprobs = None if one.logprobs is None or piece.logprobs is None else one.logprobs + piece.logprobs
        return JSONResponse(replies.whole(whole, usage))

    async def _streamed(
        self, pieces: AsyncGenerator[Piece], replies: Replies, usage: Usage, echoes: list[str], wants_usage: bool
    ) -> Response:
        """A stream of events. Errors before the first piece are ordinary answers."""
        first = await anext(pieces)

        async def events() -> AsyncIterator[str]:
            begun: set[int] = set()
            async with aclosing(pieces):
                try:
                    piece: Piece | None = first
                    while piece is not None:
                        new = piece.choice not in begun
                        begun.add(piece.choice)
                        piece.text = (echoes[piece.choice] if new else "") + piece.text
                        yield _event(replies.part(piece, new))
                        piece = await anext(pieces, None)
                    if wants_usage:
                        yield _event(replies.usage_part(usage))
                except ApiError as error:
                    yield _event(error.body())
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _count(self, usage: Usage) -> None:
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.tokens.inc(usage.completion_tokens)
        self._metrics.steps.inc(usage.denoising_steps)

    async def _reload(self, request: Request) -> Response:
        """Serves the weights of another folder, `{"checkpoint": FOLDER}`; without one, reads the same folder again.

        Requests that are being made end with the old weights.
        """
        body = await self._body(request)
        try:
            given = json.loads(body or b"{}")
            folder = given.get("checkpoint", self._reloading.current.folder)
            if not isinstance(folder, str) or given.keys() - {"checkpoint"}:
                raise ValueError
        except (ValueError, AttributeError):
            raise ApiError(400, 'expected {"checkpoint": "FOLDER"} or no body', "invalid_request") from None
        if self._options.follow is not None:
            raise ApiError(400, f"this server follows {self._options.follow} and takes no other weights", "follows")
        engines = await self._reloading.to(folder)
        now = self._reloading.current
        return JSONResponse({"checkpoint": now.folder, "weight_version": now.version, "engines": engines})


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
