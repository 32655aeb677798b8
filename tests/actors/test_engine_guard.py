"""A dead engine ends its actor's process, and a living one does not. `pytest tests/actors/test_engine_guard.py`"""

from __future__ import annotations

import asyncio
import os

import pytest
import torch

from opdlm.actors.engine_guard import guarded, one_token_forward
from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.actor import RolloutActor, start_rollout_actor
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.actor import TeacherActor, start_teacher_actor
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from tests.patience import PATIENCE
from tests.tiny import request, tiny_model, trajectory

CONFIG = TeacherConfig(targets="logits", dtype="float32")


class ProcessEnded(BaseException):
    """What the fake `os._exit` raises, since the real one does not return."""


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise ProcessEnded

    monkeypatch.setattr("opdlm.actors.engine_guard.os._exit", leave)
    return codes


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("guarded") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return str(folder)


def break_model(model) -> None:
    """Makes every forward raise from now on, as after a CUDA error that persists."""
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.empty(0, 3))


def test_an_engine_that_fails_twice_ends_the_process(exits, caplog) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ProcessEnded), guarded("student", dead):
        raise RuntimeError("the kernel did not start")
    assert exits == [1]
    assert "the student's engine is dead" in caplog.text
    assert "the kernel did not start" in caplog.text
    assert "illegal memory access" in caplog.text


def test_an_engine_that_still_answers_keeps_its_process(exits) -> None:
    model, probes = tiny_model(), []

    def probe() -> None:
        probes.append(1)
        one_token_forward(model)

    with pytest.raises(torch.OutOfMemoryError, match="once"), guarded("student", probe):
        raise torch.OutOfMemoryError("once")
    assert (exits, probes) == ([], [1])


@pytest.mark.parametrize("mistake", [OpdlmError("no such thing"), ValueError("prompt 3 is empty")])
def test_after_a_mistake_of_the_caller_the_engine_is_not_probed(exits, mistake) -> None:
    with pytest.raises(type(mistake), match=str(mistake)), guarded("teacher", lambda: pytest.fail("probed")):
        raise mistake
    assert exits == []


def test_both_roles_are_guarded(exits, chain_teacher, student) -> None:
    teacher, rollout = TeacherActor(str(chain_teacher), CONFIG), RolloutActor(student, "float32", 1)
    with pytest.raises(ValueError, match="is empty"):
        rollout.decode([request(0)], None, DecodeSettings(), 1)
    assert exits == []
    break_model(teacher._backend._model)
    break_model(rollout._model)
    sample = trajectory([5, 6, 7], [8, 9], [1, 2])
    calls = [
        lambda: teacher.score([(0, 0)], 1, None, [sample]),
        lambda: teacher.generate([sample.prompt_ids], 2, 1),
        lambda: rollout.decode([request(3, vocab=10)], None, DecodeSettings(), 1),
    ]
    for call in calls:
        with pytest.raises(ProcessEnded):
            call()
    assert exits == [1, 1, 1]


@pytest.mark.ray
@pytest.mark.slow
def test_actors_with_a_dead_engine_come_back_and_work(ray_cluster, chain_teacher, student) -> None:
    import ray

    ray.init(address=ray_cluster, ignore_reinit_error=True, logging_level="warning")
    teacher = start_teacher_actor("guarded-teacher", str(chain_teacher), CONFIG, restarts=1)
    rollout = start_rollout_actor("guarded-rollout", student, "float32", 1, 0, restarts=1)

    def pid(actor) -> int:
        return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=PATIENCE)

    def break_engine(actor, find) -> None:
        def act(self) -> None:  # runs in the actor, which cannot import a function of this test module
            find(self).model.embed_tokens.weight = torch.nn.Parameter(torch.empty(0, 3))

        ray.get(actor.__ray_call__.remote(act), timeout=PATIENCE)

    score = ("score", [(0, 0)], 1, None, [trajectory([5, 6, 7], [8, 9], [1, 2])])
    decode = ("decode", [request(3, vocab=10)], None, DecodeSettings(), 1)
    try:
        for actor, call, find, value in (
            (teacher, score, lambda self: self._backend._model, lambda scored: scored.targets.logits),
            (rollout, decode, lambda self: self._model, lambda trajectory: trajectory.response_ids),
        ):
            pool = ActorPool({"actor": actor}, timeout_seconds=300, restarts=1)
            with asyncio.Runner() as runner:  # one event loop: the pool belongs to it
                ((before,),), _ = runner.run(pool.fetch(*call, outputs=1))
                process = pid(actor)
                break_engine(actor, find)
                ((after,),), _ = runner.run(pool.fetch(*call, outputs=1))
            assert (value(after) == value(before)).all(), "the call that found the engine dead is repeated"
            assert pid(actor) != process
    finally:
        for actor in (teacher, rollout):
            ray.kill(actor)
