"""Messages of one turn of the event loop go as one. `pytest tests/deploy/run/test_together.py`"""

from __future__ import annotations

import asyncio

import pytest

from opdlm.deploy.run.together import Together


def test_what_is_ready_at_once_is_one_message_and_each_gets_its_answer() -> None:
    sent: list[list[int]] = []

    async def send_all(messages: list[int]) -> list[int]:
        sent.append(messages)
        await asyncio.sleep(0.01)
        if 13 in messages:
            raise OSError("not today")
        return [10 * message for message in messages]

    async def scenario() -> None:
        together = Together(send_all)
        first = asyncio.gather(*(together.send(i) for i in range(5)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await asyncio.gather(first, together.send(5)) == [[0, 10, 20, 30, 40], 50]
        for failed in await asyncio.gather(together.send(13), together.send(14), return_exceptions=True):
            assert isinstance(failed, OSError)
        with pytest.raises(OSError, match="not today"):
            await together.send(13)

    asyncio.run(scenario())
    assert sent == [[0, 1, 2, 3, 4], [5], [13, 14], [13]]
