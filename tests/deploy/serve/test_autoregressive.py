"""An autoregressive model behind the same API. `pytest tests/deploy/serve/test_autoregressive.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from opdlm.actors.teacher.generation import generate
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.serve.options import ServeOptions, check_model
from tests.deploy.serve import test_server
from tests.deploy.serve.test_server import KEY
from tests.patience import PATIENCE
from tests.tiny import save_teacher

server, client = test_server.server, test_server.client


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two autoregressive models with the same tokenizer and different weights."""
    folder = tmp_path_factory.mktemp("served")
    return [save_teacher(folder / f"teacher{seed}", seed, context=512) for seed in (0, 1)]


def expected(folder: Path, prompt: str, limit: int) -> str:
    """The greedy response."""
    facts, tokenizer = read_facts(folder), load_tokenizer(folder)
    ids = np.array(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int32)
    (found,) = generate(load_model(folder), [ids], limit, facts.eos_ids, 1, tokens=facts.tokens)
    return str(tokenizer.decode(found, skip_special_tokens=True))


@pytest.mark.ray
def test_an_autoregressive_model_is_served_like_a_student(server, client, folders) -> None:
    prompts = ["1+2=", "13-1=", "5"]
    greedy: dict[str, Any] = {"model": "tiny", "prompt": prompts, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**greedy)
    assert [choice.text for choice in whole.choices] == [expected(folders[0], prompt, 20) for prompt in prompts]
    assert whole.usage.model_dump()["tokens_per_step"] <= 1

    sampled: dict[str, Any] = {"model": "tiny", "prompt": "1+2=", "max_tokens": 20, "seed": 5, "temperature": 1.0}
    several = client.completions.create(n=4, logprobs=1, **sampled)
    assert len({choice.text for choice in several.choices}) > 1
    assert all(value <= 0 for choice in several.choices for value in choice.logprobs.token_logprobs)
    text = several.choices[0].text
    parts = [part.choices[0].text for part in client.completions.create(stream=True, **sampled)]
    assert "".join(parts) == text
    assert len(parts) > 1
    stopped = client.completions.create(stop=text[2:4], **sampled).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(text[2:4])], "stop")

    headers = {"Authorization": f"Bearer {KEY}"}
    for change, said in (
        ({"threshold": 0.5}, "threshold: found 0.5; the model is autoregressive"),
        ({"strategy": "verified"}, "strategy: found 'verified'; the model is autoregressive"),
        ({"max_tokens": 1000}, "the model's context is 512"),
    ):
        answer = httpx.post(f"{server}/v1/completions", json=greedy | change, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
    asked = {"checkpoint": str(folders[1])}
    httpx.post(f"{server}/admin/reload", json=asked, headers=headers, timeout=PATIENCE).raise_for_status()
    new = client.completions.create(**greedy)
    assert [choice.text for choice in new.choices] == [expected(folders[1], prompt, 20) for prompt in prompts]


@pytest.mark.parametrize(("option", "value"), [("strategy", "verified"), ("cache_tokens", 100)])
def test_what_only_a_student_has_is_refused_before_anything_starts(folders, option, value) -> None:
    facts, options = read_facts(folders[0]), ServeOptions(checkpoint=str(folders[0]))
    check_model(facts, options)
    with pytest.raises(OpdlmError, match=f"--{option.replace('_', '-')}: found .*is an autoregressive model"):
        check_model(facts, options.model_copy(update={option: value}))
