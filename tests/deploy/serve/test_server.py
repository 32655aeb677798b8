"""A server with a tiny student, asked by OpenAI's client and by raw requests. `pytest tests/deploy/serve`"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from rich.text import Text

from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.chat.answering import How, There
from opdlm.deploy.serve.options import ServeOptions
from tests.deploy.serve.served import processes_of, running_engines, serving
from tests.deploy.serve.steps import choices, plain, told
from tests.patience import PATIENCE, wait_until
from tests.tiny import save_teacher

pytestmark = pytest.mark.ray
KEY = "correct horse"
TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two students with the same tokenizer, which has a chat template, and different weights."""
    folder = tmp_path_factory.mktemp("served")
    for seed in (0, 1):
        teacher = save_teacher(folder / f"teacher{seed}", seed, context=512)
        (teacher / "chat_template.jinja").write_text(TEMPLATE)
        convert_checkpoint(teacher, folder / f"student{seed}", block_size=4, block_grid="absolute")
    return [folder / "student0", folder / "student1"]


@pytest.fixture(scope="module")
def server(ray_cluster, folders, tmp_path_factory) -> Iterator[str]:
    """The address of a server with two engines."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"other\n{KEY}\n")
    options = ServeOptions(
        checkpoint=str(folders[0]),
        name="tiny",
        replicas=2,
        slots=4,
        max_requests=40,
        api_key_file=str(keys),
        max_body_bytes=20_000,
        cpus_per_replica=1,
    )
    with serving(ray_cluster, options) as address:
        yield address


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    """OpenAI's client, which does not retry."""
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)


def get(server: str, path: str) -> httpx.Response:
    """The answer to a request with the key."""
    return httpx.get(f"{server}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)


def post(server: str, path: str, body: dict[str, Any]) -> httpx.Response:
    """The answer to a request with the key."""
    return httpx.post(f"{server}{path}", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)


def figure(server: str, name: str) -> float:
    """One figure of /metrics, summed over its labels."""
    lines = get(server, "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_openais_client_lists_completes_chats_and_streams(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "opdlm"
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "seed": 5, "temperature": 1.0}
    whole = client.completions.create(prompt=["1+2=", "3-1="], n=2, logprobs=1, **how)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) > 1
    for choice in whole.choices:
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    usage = whole.usage.model_dump()
    assert usage["total_tokens"] == 16 + usage["completion_tokens"]
    assert usage["tokens_per_step"] == pytest.approx(usage["completion_tokens"] / usage["denoising_steps"], abs=1e-3)
    parts = list(client.completions.create(prompt="1+2=", stream=True, stream_options={"include_usage": True}, **how))
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].usage.completion_tokens > 0
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "1+2"}], **how}
    answer = client.chat.completions.create(logprobs=True, extra_body={"threshold": 0.2}, **chat)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert all(token.logprob <= 0 for token in answer.choices[0].logprobs.content)
    streamed = client.chat.completions.create(stream=True, extra_body={"threshold": 0.2}, **chat)
    assert "".join(part.choices[0].delta.content for part in streamed) == answer.choices[0].message.content


def test_opdlm_chat_talks_with_it(server, client, tmp_path) -> None:
    key, shown = tmp_path / "key", list[Text]()
    key.write_text(KEY)
    asked = [{"role": "user", "content": "1+2"}]
    found = There(server, 24, key).answer(asked, How(threshold=0.2), shown.append)
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "temperature": 0.0, "extra_body": {"threshold": 0.2}}
    expected = client.chat.completions.create(messages=asked, **how)
    assert found.text == expected.choices[0].message.content == shown[-1].plain
    assert found.denoising_steps == expected.usage.model_dump()["denoising_steps"]


def test_a_stop_string_ends_a_response_before_it(client) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "1+2=", "max_tokens": 40, "seed": 5, "temperature": 1.0}
    text = client.completions.create(**how).choices[0].text
    assert len(text) > 3
    stopped = client.completions.create(stop=["never", text[2:4]], **how).choices[0]
    assert stopped.text == text[: text.find(text[2:4])]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt"}, 404, "found 'gpt'; this server has 'tiny'"),
        ({"prompt": ""}, 400, "prompt: it is empty"),
        ({"prompt": [99]}, 400, "found token 99"),
        ({"max_tokens": 100_000}, 400, "the model's context is 512"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"best_of": 3}, 400, "best_of: "),
        ({"strategy": "verified"}, 400, "this server decodes with 'low_confidence_dynamic'"),
        ({"n": 41}, 400, "makes 40 at a time"),
        ({"prompt": "1" * 30_000}, 413, "larger than 20000 bytes"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_gets_an_error_in_openais_shape(server, change, status, said, stream) -> None:
    body = {"model": "tiny", "prompt": "1+2=", "stream": stream} | change
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_keys_paths_and_health(server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.get(f"{server}/v1/models", headers=headers, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert get(server, "/nothing").status_code == 404
    assert httpx.get(f"{server}/health", timeout=PATIENCE).json() == {"status": "ok"}


def test_a_client_that_leaves_frees_its_slot(server, client) -> None:
    with client.completions.create(
        model="tiny", prompt="1+2=", max_tokens=480, n=8, temperature=1.0, top_p=0.9, stream=True
    ) as stream:
        next(iter(stream))
    wait_until(lambda: figure(server, "opdlm_active_responses") == 0, "the slots of the client that left")


def test_requests_beyond_the_queue_get_429_and_the_others_are_answered(server, client) -> None:
    def ask(seed: int) -> str:
        try:
            return (
                client.completions.create(model="tiny", prompt="1+2=", max_tokens=60, seed=seed, temperature=1.0, n=8)
                .choices[0]
                .finish_reason
            )
        except openai.RateLimitError:
            return "429"

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    assert set(found) <= {"stop", "length", "429"}
    assert "429" in found
    assert found.count("429") < 16


def test_steps_go_on_where_an_engine_dies(cluster, server, client, folders) -> None:
    asked, begun, retried = 8, threading.Semaphore(0), threading.Event()
    how: dict[str, Any] = {"model": "tiny", "prompt": "12+3=", "max_tokens": 480}  # it has no end token
    expected = client.completions.create(**how).choices[0].text
    retries = figure(server, "opdlm_retries_total")

    def watch(_: int) -> list[list[Any]]:
        """Asks until an engine died with a response, so that both engines have some most of the time."""
        found = []
        while not retried.is_set():
            found.append([])
            for part in client.completions.create(stream=True, extra_body={"steps": True}, **how):
                found[-1].append(part)
                if len(found[-1]) == 3:
                    begun.release()
        return found

    with ThreadPoolExecutor(asked) as pool:
        streams = [pool.submit(watch, n) for n in range(asked)]
        try:
            for _ in range(3):
                assert begun.acquire(timeout=PATIENCE)
            while figure(server, "opdlm_retries_total") == retries:
                wait_until(lambda: running_engines() == 2, "both engines")
                (killed, *_) = engine_processes(cluster)
                os.kill(killed, signal.SIGKILL)
                # If clients stood still for long, it had answered everything, and the next one may not have.
                wait_until(
                    lambda: figure(server, "opdlm_retries_total") > retries or running_engines() == 2,
                    "a retry, or another engine",
                )
        finally:
            retried.set()
        found = [choices(parts, 0) for stream in streams for parts in stream.result()]
    for events in found:
        numbers, texts = told(events)
        assert numbers == list(range(1, len(numbers) + 1))
        assert "".join(event["text"] for event in events) == expected == plain(texts, folders[0], 480)


def test_new_weights_lose_no_request_and_an_engine_that_dies_loses_none(cluster, server, client, folders) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "1+2=", "max_tokens": 100}
    before = client.completions.create(**how).choices[0].text
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.completions.create, **how) for _ in range(8)]
        wrong = post(server, "/admin/reload", {"checkpoint": "nowhere"})
        right = post(server, "/admin/reload", {"checkpoint": str(folders[1])})
        assert (wrong.status_code, right.status_code) == (400, 200), (wrong.text, right.text)
        texts = {answer.result().choices[0].text for answer in asked}
        after = client.completions.create(**how).choices[0].text
        assert after != before
        assert texts <= {before, after}
        asked = [pool.submit(client.completions.create, **how | {"max_tokens": 480}) for _ in range(12)]
        os.kill(engine_processes(cluster)[0], signal.SIGKILL)
        assert len({answer.result().choices[0].text for answer in asked}) == 1


def engine_processes(cluster: Any) -> list[int]:
    """Process ids of the engines of this cluster."""
    return [process.pid for process in processes_of(cluster, "engine")]
