"""Reloads, time-outs and deaths of a server with two engines. `pytest tests/deploy/serve/test_operations.py`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.serve.options import ServeOptions
from tests.deploy.serve.served import (
    answers,
    ask,
    asked_of_engines,
    endless_student,
    kill,
    model,
    running_engines,
    serving,
    text,
)
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.ray
CONTEXT = 1 << 17
SHORT = 24
SLOW: dict[str, Any] = {"threshold": 1.0}
"""A token a step."""


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> list[Path]:
    """Two students with different weights, and the texts that they give."""
    folder = tmp_path_factory.mktemp("operated")
    return [endless_student(folder, seed, CONTEXT) for seed in (0, 1)]


@pytest.fixture(scope="module")
def server(ray_cluster, students) -> Iterator[str]:
    """A server of two engines with one slot each, where a request has 30 seconds."""
    options = ServeOptions(checkpoint=str(students[0]), name="tiny", replicas=2, slots=1, request_seconds=30)
    with serving(ray_cluster, options) as url:
        yield url


def expected(student: Path, prompt: str, tokens: int) -> str:
    """What a decoder of this request alone says."""
    return Model(student).generate([prompt], max_new_tokens=tokens)[0].text


def reload(server: str, **body: str) -> httpx.Response:
    return httpx.post(f"{server}/admin/reload", json=body, timeout=PATIENCE)


def test_a_stream_ends_with_the_weights_it_began_with_and_a_reload_returns_when_all_have_the_new_ones(
    server, students
) -> None:
    begun = text(ask(server, "1+2=", 400, **SLOW))
    asked = {"model": "tiny", "prompt": "1+2=", "max_tokens": 400, "stream": True, **SLOW}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", f"{server}/v1/completions", json=asked, timeout=PATIENCE) as stream,
    ):
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        parts = [json.loads(next(lines))]
        reloading = pool.submit(reload, server, checkpoint=str(students[1]))
        parts += [json.loads(line) for line in lines if line != "[DONE]"]
        answer = reloading.result()
    assert "".join(part["choices"][0]["text"] for part in parts) == begun
    assert (answer.status_code, answer.json()["weight_version"], answer.json()["engines"]) == (200, 1, 2), answer.text
    assert [weights.folder for weights in asked_of_engines("newest")] == [str(students[1])] * 2
    assert {state.version for state in asked_of_engines("load", asked_of_engines("newest")[0])} == {1}
    assert model(server)["checkpoint"] == str(students[1])
    after = expected(students[1], "1+2=", SHORT)
    assert after != expected(students[0], "1+2=", SHORT)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(ask, server, "1+2=", SHORT) for _ in range(4)]
        assert {text(answer.result()) for answer in found} == {after}


def test_a_folder_that_one_engine_cannot_use_changes_nothing(server, students, tmp_path) -> None:
    before = model(server)
    for folder, said in ((tmp_path, "config.json"), (students[0].with_name("teacher0"), "vocab_size: found")):
        answer = reload(server, checkpoint=str(folder))
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("the old weights stay: engine ")
        assert said in message
    assert model(server) == before


def test_a_request_that_takes_too_long_gets_503_and_frees_its_slot(server) -> None:
    long = {"model": "tiny", "prompt": "1+2=", "max_tokens": CONTEXT - 100, "stream": True, **SLOW}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", f"{server}/v1/completions", json=long, timeout=PATIENCE) as stream,
    ):
        events = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        lines = [next(events)]  # it has a slot by now; the other request may wait behind it until its own time is over
        whole = pool.submit(ask, server, "1+2=", CONTEXT - 100, **SLOW)
        lines += events
    assert whole.result().status_code == 503
    limit = {"message": "the request took longer than 30 s", "type": "server_error", "param": None, "code": "timeout"}
    assert whole.result().json()["error"] == limit
    assert (json.loads(lines[-2])["error"], lines[-1]) == (limit, "[DONE]")
    assert json.loads(lines[0])["choices"][0]["text"]
    wait_until(lambda: asked_of_engines("unfinished") == [0, 0], "the slots of what took too long")
    with ThreadPoolExecutor(4) as pool:  # more than there are slots
        assert {a.status_code for a in pool.map(lambda n: ask(server, f"{n}+2=", SHORT), range(4))} == {200}


def test_whoever_dies_comes_back_with_the_newest_weights(server, cluster, students) -> None:
    weights, after = model(server), expected(students[1], "1+2=", SHORT)
    assert weights["weight_version"] > 0
    kill(cluster, "api")
    wait_until(lambda: answers(server), "the front")
    told = ("checkpoint", "weight_version")
    assert [model(server)[name] for name in told] == [weights[name] for name in told]
    assert text(ask(server, "1+2=", SHORT)) == after
    kill(cluster, "engine")
    wait_until(lambda: running_engines() == 2, "both engines")
    assert text(ask(server, "1+2=", SHORT)) == after
    assert [found.version for found in asked_of_engines("newest")] == [weights["weight_version"]] * 2
    again = reload(server)
    assert (again.status_code, again.json()["weight_version"]) == (200, weights["weight_version"] + 1), again.text
