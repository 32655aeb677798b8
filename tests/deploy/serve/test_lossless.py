"""A lossless checkpoint behind the API gives its teacher's own answers. `pytest tests/deploy/serve/test_lossless.py`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opdlm.common.config.schema import LoraConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import NoisyAdapters, adapter_parameters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.folder import save_student
from opdlm.common.model.load import load_model
from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.serve.options import ServeOptions
from tests.deploy.serve.served import ask, serving

pytestmark = pytest.mark.ray
DRAFTS, TOKENS = 3, 40
PROMPTS = ["1+2=", "47+8-3=", "9", "12-3+4-5="]


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> Path:
    """A lossless student of the teacher with random adapters, so that its drafts are often wrong."""
    folder = tmp_path_factory.mktemp("lossless")
    convert_checkpoint(chain_teacher, folder / "start", DRAFTS, "response", logit_shift=True, context="causal")
    made = load_model(folder / "start")
    NoisyAdapters(made, LoraConfig(rank=2, tokens="noisy"), require_mask(read_facts(folder / "start")), seed=0)
    with torch.no_grad():
        for _, parameter in adapter_parameters(made):
            parameter.normal_(std=0.3)
    save_student(made, folder / "start", folder / "student", BlockGrid(DRAFTS, "response"))
    return folder / "student"


@pytest.fixture(scope="module")
def server(ray_cluster, student) -> Iterator[str]:
    with serving(ray_cluster, ServeOptions(checkpoint=str(student), name="tiny", slots=2).resolved()) as url:
        yield url


def test_the_server_gives_the_teachers_greedy_answers(server, chain_teacher) -> None:
    said = Model(chain_teacher).generate(PROMPTS, max_new_tokens=TOKENS)
    answer = ask(server, PROMPTS, TOKENS, n=2)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [choice["text"] for choice in body["choices"]] == [one.text for one in said for _ in range(2)]
    assert len({one.text for one in said}) > 1
    usage = body["usage"]
    assert 1 <= usage["denoising_steps"] <= usage["completion_tokens"] + len(body["choices"])


def test_what_lossless_decoding_cannot_do_is_refused(server) -> None:
    for change, said in (
        ({"temperature": 0.5}, "lossless decoding has the server's, 0.0"),
        ({"threshold": 0.5}, "strategy 'verified' has none"),
        ({"logprobs": 1}, "lossless decoding keeps none"),
    ):
        answer = ask(server, "1+2=", 4, **change)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
