"""An engine is killed under load, and no request fails. `pytest tests/deploy/serve/test_killed.py -m slow`"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.deploy.serve import test_server
from tests.deploy.serve.test_server import engine_processes, figure
from tests.patience import PATIENCE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
folders, server, client = test_server.folders, test_server.server, test_server.client
PROMPTS = [f"{a}+{b}=" for a in range(1, 6) for b in range(1, 6)]


def test_an_engine_killed_under_load_fails_no_request(cluster, server, client) -> None:
    """One in three requests is streamed, one in three has a stop string, one in three is neither."""
    begun = threading.Event()

    def ask(number: int) -> str:
        how: dict[str, Any] = {"model": "tiny", "max_tokens": 200 + 40 * (number % 5), "seed": number}
        how |= {"prompt": PROMPTS[number % len(PROMPTS)], "temperature": 1.0}
        if number % 3 == 1:
            how["stop"] = "never said"
        if number % 3 != 2:
            return client.completions.create(**how).choices[0].text
        text, ends = "", 0
        for part in client.completions.create(stream=True, **how):
            begun.set()
            text += part.choices[0].text
            ends += part.choices[0].finish_reason is not None
        assert ends == 1, "the stream ended early"
        return text

    numbers = range(36)
    calm = [ask(number) for number in numbers]
    begun.clear()
    with ThreadPoolExecutor(len(numbers)) as pool:
        asked = [pool.submit(ask, number) for number in numbers]
        assert begun.wait(PATIENCE)
        os.kill(engine_processes(cluster)[0], signal.SIGKILL)
        found = [answer.result() for answer in asked]
    assert found == calm, "the same request has the same response, whoever makes it"
    assert figure(server, "opdlm_retries_total") > 0
