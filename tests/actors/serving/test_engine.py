"""The engine of a server: streams, cancels, reloads, and decodes as the block decoder does."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.serving.engine import ServingEngine
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.types import RolloutRequest, Trajectory
from tests.fakes.held_forward import held_in
from tests.patience import PATIENCE
from tests.tiny import save_teacher

SETTINGS = DecodeSettings(threshold=0.6)
WAYS = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8), (1.0, 1.0), (0.0, 1.0)]


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> list[Path]:
    """Two students with different weights."""
    folder = tmp_path_factory.mktemp("students")
    for seed in (0, 1):
        convert_checkpoint(
            save_teacher(folder / f"teacher{seed}", seed),
            folder / f"student{seed}",
            block_size=4,
            block_grid="absolute",
        )
    return [folder / "student0", folder / "student1"]


def requests(limit: int = 16) -> list[RolloutRequest]:
    """Requests that sample in different ways."""
    return [
        RolloutRequest(n, f"test/{n}", np.arange(3, 6 + n, dtype=np.int32), limit, seed=n, sampling=way)
        for n, way in enumerate(WAYS)
    ]


def decoded(folder: Path, request: RolloutRequest, **settings: object) -> Trajectory:
    """What a decoder of this request alone makes of it, with the request's way to sample in its settings."""
    facts = read_facts(folder)
    assert request.sampling is not None
    temperature, top_p = request.sampling
    how = replace(SETTINGS, temperature=temperature, top_p=top_p, **settings)
    decoder = BlockDecoder(
        load_model(str(folder), "float32"), how, require_mask(facts), facts.eos_ids, 1, tokens=facts.tokens
    )
    return decoder.decode([replace(request, sampling=None)])[0][0]


def collect(engine: ServingEngine, request: RolloutRequest) -> queue.Queue[Tokens | BaseException]:
    """Submits a request; returns what it gets."""
    got: queue.Queue[Tokens | BaseException] = queue.Queue()
    engine.submit(request, got.put)
    return got


def parts(got: queue.Queue[Tokens | BaseException]) -> list[Tokens]:
    """All parts of a response."""
    found: list[Tokens] = []
    while not found or found[-1].end is None:
        part = got.get(timeout=PATIENCE)
        assert isinstance(part, Tokens), part
        found.append(part)
    return found


def test_responses_are_those_of_a_decoder_of_each_request_alone(students) -> None:
    engine = ServingEngine(str(students[0]), SETTINGS, 3, "float32", 1)
    streams = [collect(engine, request) for request in requests()]
    for request, stream in zip(requests(), streams, strict=True):
        found, expected = parts(stream), decoded(students[0], request, keep_logprobs=request.sampling[0] > 0)
        ids = [token for part in found for token in part.ids]
        end = expected.response_length - (expected.finish_reason == "eos")
        assert ids == expected.response[:end].tolist()
        assert (found[-1].end, found[-1].denoising_steps) == (expected.finish_reason, expected.denoising_steps)
        assert all(len(part.ids) <= 4 for part in found)
        logprobs = np.array([value for part in found for value in part.logprobs or ()])
        assert len(logprobs) == len(ids)
        assert (logprobs <= 0).all()
        if expected.reveal_logprob is not None:
            np.testing.assert_allclose(logprobs, expected.reveal_logprob[:end], atol=1e-5)


def steps_of(folder: Path, watched: bool, **more: int) -> tuple[list[Tokens], list[Tokens], int]:
    """What two requests side by side get, of which the second one may be watched; and how often one was put back."""
    engine = ServingEngine(str(folder), replace(SETTINGS, ignore_eos=True), 2, "float32", 1, **more)
    asked = [
        replace(request, max_new_tokens=40, watched=watched and n == 1) for n, request in enumerate(requests()[:2])
    ]
    there, go = held_in(engine._model, 1)
    streams = [collect(engine, asked[0])]
    assert there.wait(PATIENCE)
    streams.append(collect(engine, asked[1]))
    go.set()
    first, second = map(parts, streams)
    return first, second, engine._serving.put_back


@pytest.mark.parametrize("more", [{}, {"cache_tokens": 64}])
def test_a_watched_request_gets_each_step_once_and_changes_nothing(students, more) -> None:
    """Also where the cache is full, so that it is put back and decoded again."""
    plain = steps_of(students[0], False, **more)
    other, watched, put_back = steps_of(students[0], True, **more)
    assert put_back == plain[2] == (1 if more else 0)
    assert other == plain[0], "nobody watches it"
    assert [part for part in watched if part.step is None] == plain[1]
    steps = [part.step for part in watched if part.step is not None]
    assert [step.number for step in steps] == list(range(1, plain[1][-1].denoising_steps + 1))
    told = {p: t for step in steps for p, t, now in zip(step.positions, step.ids, step.revealed, strict=True) if now}
    ids = [token for part in watched for token in part.ids]
    assert [told[position] for position in range(len(ids))] == ids
    at = {id(part): place for place, part in enumerate(watched)}
    block = next(part for part in watched if part.step is None)
    before = [part.step.number for part in watched[: at[id(block)]] if part.step is not None]
    assert before[-1] == block.denoising_steps, "a block comes right after its last step"


def test_a_cancelled_request_frees_its_slot_and_gets_nothing_more(students) -> None:
    engine = ServingEngine(str(students[0]), replace(SETTINGS, ignore_eos=True), 1, "float32", 1)
    first: queue.Queue[Tokens | BaseException] = queue.Queue()
    there, go = held_in(engine._model, 20)
    index = engine.submit(replace(requests()[0], max_new_tokens=100), first.put)
    waits = engine.submit(requests()[1], first.put)
    assert there.wait(PATIENCE)
    assert isinstance(first.get(timeout=PATIENCE), Tokens)
    engine.cancel(index)
    engine.cancel(waits)
    go.set()
    found = parts(collect(engine, requests()[2]))
    assert found[-1].end == "length"
    assert engine.unfinished == 0
    assert not any(isinstance(part, Tokens) and part.end for part in first.queue)


def test_new_weights_come_between_requests_and_another_model_is_refused(students, tmp_path) -> None:
    engine = ServingEngine(str(students[0]), SETTINGS, 2, "float32", 1)
    before = [collect(engine, request) for request in requests()[:2]]
    assert engine.take(engine.weights_of(str(students[1])), 3) == 3
    assert engine.take(engine.weights_of(str(students[0])), 2) == 3, "an older version changes nothing"
    for stream in before:
        assert len({part.weight_version for part in parts(stream)}) == 1
    found = parts(collect(engine, requests()[0]))
    expected = decoded(students[1], requests()[0])
    assert found[-1].weight_version == 3
    assert found[-1].denoising_steps == expected.denoising_steps
    convert_checkpoint(save_teacher(tmp_path / "t"), tmp_path / "other", block_size=8, block_grid="absolute")
    with pytest.raises(OpdlmError, match="block_size: found 8; expected 4"):
        engine.take(engine.weights_of(str(tmp_path / "other")), 4)
    assert parts(collect(engine, requests()[0]))[-1].weight_version == 3


def test_a_prompt_that_does_not_fit_is_refused(students) -> None:
    engine = ServingEngine(str(students[0]), SETTINGS, 1, "float32", 1)
    with pytest.raises(ValueError, match="context is 128"):
        engine.submit(requests(limit=200)[0], lambda part: None)
    assert engine.unfinished == 0
