"""Denoising steps in a stream, read by OpenAI's client. `pytest tests/deploy/serve/test_steps.py`

`test_server.py` has the engine that dies meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from opdlm.deploy.serve.options import ServeOptions
from tests.deploy.serve import test_server
from tests.deploy.serve.local_server import local_server
from tests.deploy.serve.steps import choices, plain, told
from tests.patience import PATIENCE

folders = test_server.folders


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[str]:
    with local_server(ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2)) as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def test_each_step_comes_before_the_text_of_its_block(client, folders) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "1+2=", "max_tokens": 24, "seed": 5, "temperature": 1.0, "n": 3}
    whole = client.completions.create(**how)
    usage = {"include_usage": True}
    parts = list(client.completions.create(stream=True, stream_options=usage, extra_body={"steps": True}, **how))
    numbers = []
    for choice in whole.choices:
        events = choices(parts, choice.index)
        assert "".join(event["text"] for event in events) == choice.text
        assert all(event["text"] == "" and event["finish_reason"] is None for event in events if "step" in event)
        steps, texts = told(events)
        assert steps == list(range(1, len(steps) + 1))
        numbers.append(len(steps))
        first = next(event["step"] for event in events if "step" in event)
        assert all(0 < token["confidence"] <= 1 for token in first["tokens"])
        assert [token["position"] for token in first["tokens"]] == [0, 1, 2, 3], "the prompt fills a block"
        known = dict[int, str]()
        for event in events:  # text never comes before the tokens that it is of
            for token in event.get("step", {"tokens": []})["tokens"]:
                if token["revealed"]:
                    known[token["position"]] = token["text"]
            sent = "".join(known[position] for position in sorted(known))
            assert event["text"] in sent
        assert choice.text == plain(texts, folders[0], len(texts))[: len(choice.text)]
    assert parts[-1].usage.model_dump()["denoising_steps"] == sum(numbers)


def test_a_chat_has_steps_too_and_without_a_stream_they_are_refused(server, client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "1+2"}], "max_tokens": 12}
    parts = list(client.chat.completions.create(stream=True, extra_body={"steps": True, "threshold": 0.2}, **asked))
    events = choices(parts, 0)
    assert events[0]["delta"]["role"] == "assistant"
    assert told(events)[0]
    without = list(client.chat.completions.create(stream=True, extra_body={"threshold": 0.2}, **asked))
    assert not any("step" in event for event in choices(without, 0))
    assert "".join(e["delta"]["content"] for e in events) == "".join(p.choices[0].delta.content for p in without)
    refused = httpx.post(f"{server}/v1/chat/completions", json=asked | {"steps": True}, timeout=PATIENCE)
    assert refused.status_code == 400
    assert "steps: found true without stream" in refused.json()["error"]["message"]


@pytest.mark.parametrize("deaths", [[0], [1], [9, 4], [5, 23, 0, 90]])
def test_steps_and_text_go_on_behind_what_was_sent_before_an_engine_died(client, folders, deaths, monkeypatch) -> None:
    monkeypatch.setattr("opdlm.deploy.serve.generation._PAUSE_SECONDS", 0.01)
    how: dict[str, Any] = {"model": "tiny", "prompt": "12+3=", "max_tokens": 60, "extra_body": {"steps": True}}
    expected = list(client.completions.create(stream=True, **how))
    options = ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2)
    with local_server(options, deaths) as address:
        own = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        found = list(own.completions.create(stream=True, **how))
    assert choices(found, 0) == choices(expected, 0), "each part once, in the same order"
    numbers, texts = told(choices(found, 0))
    assert numbers == list(range(1, len(numbers) + 1))
    assert plain(texts, folders[0], 60) == "".join(choice["text"] for choice in choices(found, 0))
