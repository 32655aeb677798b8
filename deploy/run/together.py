"""Messages that are ready at the same time are sent as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")
Answer = TypeVar("Answer")


class Together(Generic[Message, Answer]):
    """Collects what is sent in one turn of the event loop.

    Args:
        send_all: sends a list of messages; returns the answer to each, in order.
    """

    def __init__(self, send_all: Callable[[list[Message]], Awaitable[list[Answer]]]) -> None:
        self._send_all = send_all
        self._ready: list[tuple[Message, asyncio.Future[Answer]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def send(self, message: Message) -> Answer:
        """Sends a message; returns its answer, or raises what `send_all` raised."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._ready.append((message, answer))
        if len(self._ready) == 1:
            sending = asyncio.create_task(self._send())
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        return await answer

    async def _send(self) -> None:
        await asyncio.sleep(0)  # whatever is ready in this turn goes along
        ready, self._ready = self._ready, []
        try:
            answers = await self._send_all([message for message, _ in ready])
        except Exception as error:
            for _, future in ready:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(ready, answers, strict=True):
            if not future.done():
                future.set_result(answer)
