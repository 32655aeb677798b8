"""The engine of an autoregressive model: static batches of `generate`, behind the interface of the block decoder's.

`pytest tests/actors/serving/test_autoregressive.py`
"""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.serving.engine import ServingEngine
from opdlm.actors.teacher.generation import generate
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.types import RolloutRequest
from tests.actors.serving.test_engine import collect, parts
from tests.fakes.held_forward import held_in
from tests.patience import PATIENCE
from tests.tiny import save_teacher

SETTINGS = DecodeSettings(block_size=4)
LIMITS = [1, 7, 16, 3, 12, 5]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two autoregressive models with different weights."""
    folder = tmp_path_factory.mktemp("models")
    return [save_teacher(folder / f"teacher{seed}", seed) for seed in (0, 1)]


def requests(temperature: float = 0.0, top_p: float = 1.0) -> list[RolloutRequest]:
    """Requests of mixed lengths."""
    return [
        RolloutRequest(n, f"test/{n}", np.arange(3, 5 + n, dtype=np.int32), limit, n, sampling=(temperature, top_p))
        for n, limit in enumerate(LIMITS)
    ]


def engine_of(folder: Path, batch_size: int = 4, **settings: object) -> ServingEngine:
    return ServingEngine(str(folder), replace(SETTINGS, **settings), batch_size, "float32", 1)


def answers(engine: ServingEngine, asked: list[RolloutRequest]) -> list[list[Tokens]]:
    """The parts of each response; all requests are sent before the first is answered."""
    return [parts(stream) for stream in [collect(engine, request) for request in asked]]


def ids_of(found: list[Tokens]) -> list[int]:
    return [token for part in found for token in part.ids]


def test_greedy_responses_are_those_of_generate_for_each_request_alone(models) -> None:
    facts, model = read_facts(models[0]), load_model(models[0], "float32")
    for request, found in zip(requests(), answers(engine_of(models[0]), requests()), strict=True):
        prompts = [request.prompt_ids]
        (expected,) = generate(model, prompts, request.max_new_tokens, facts.eos_ids, 1, tokens=facts.tokens)
        ended = int(expected[-1]) in facts.eos_ids
        response = expected[: len(expected) - ended].tolist()
        assert ids_of(found) == response
        assert (found[-1].end, found[-1].denoising_steps) == ("eos" if ended else "length", len(expected))
        assert all(len(part.ids) <= 4 for part in found), "a part has as many tokens as a block"
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids.tolist(), *response]])).logits[0]
        logits[:, facts.tokens.others(facts.vocab_size)] = float("-inf")
        behind = logits[len(request.prompt_ids) - 1 :].log_softmax(-1)
        kept = [value for part in found for value in part.logprobs or ()]
        np.testing.assert_allclose(kept, [float(behind[n, token]) for n, token in enumerate(response)], atol=1e-4)


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_batch(models) -> None:
    asked = requests(temperature=1.0, top_p=0.9)
    together = [ids_of(found) for found in answers(engine_of(models[0], 6), asked)]
    alone = engine_of(models[0], 1)
    assert [ids_of(answers(alone, [request])[0]) for request in asked] == together
    others = [replace(request, seed=request.seed + 100) for request in asked]
    assert [ids_of(found) for found in answers(alone, others)] != together


def test_the_servers_temperature_is_that_of_requests_that_bring_none(models) -> None:
    asked = [replace(request, sampling=None) for request in requests()]
    found = answers(engine_of(models[0], temperature=1.0, top_p=0.9), asked)
    assert list(map(ids_of, found)) == [
        ids_of(one) for one in answers(engine_of(models[0]), requests(temperature=1.0, top_p=0.9))
    ]


def test_cancelled_requests_end_their_batch_and_get_nothing_more(models) -> None:
    engine = engine_of(models[0], 2, ignore_eos=True)
    first: queue.Queue[Tokens | BaseException] = queue.Queue()
    long = replace(requests()[0], max_new_tokens=100)
    there, go = held_in(engine._model, 20)
    indices = [engine.submit(long, first.put) for _ in range(3)]
    assert there.wait(PATIENCE)
    assert isinstance(first.get(timeout=PATIENCE), Tokens)
    for index in indices:
        engine.cancel(index)
    go.set()
    found = parts(collect(engine, requests()[1]))
    assert (found[-1].end, len(ids_of(found))) == ("length", LIMITS[1])
    assert engine.unfinished == 0
    assert not any(isinstance(part, Tokens) and part.end for part in first.queue)


def test_new_weights_come_between_batches(models) -> None:
    engine = engine_of(models[0])
    assert engine.take(engine.weights_of(str(models[1])), 3) == 3
    found, expected = answers(engine, requests()), answers(engine_of(models[1]), requests())
    assert list(map(ids_of, found)) == list(map(ids_of, expected))
    assert {part.weight_version for parts_ in found for part in parts_} == {3}


def test_a_request_that_does_not_fit_is_refused(models) -> None:
    engine = engine_of(models[0])
    for change, said in (
        ({"max_new_tokens": 200}, "take 202 positions; the model's context is 128"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"prompt_ids": np.empty(0, np.int32)}, "is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.submit(replace(requests()[0], **change), lambda part: None)
    assert engine.unfinished == 0


def test_broken_weights_are_named_to_every_request(models) -> None:
    engine = engine_of(models[0])
    with torch.no_grad():
        engine._model.lm_head.weight.fill_(float("nan"))
    for stream in [collect(engine, request) for request in requests()[:3]]:
        error = stream.get(timeout=PATIENCE)
        assert isinstance(error, OpdlmError)
        assert "NaN or infinity" in str(error)
