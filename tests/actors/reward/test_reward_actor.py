"""Rewards and advantages of groups of responses. `pytest tests/actors/reward`"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from opdlm.actors.reward.actor import RewardActor
from opdlm.common.config.reward import RewardConfig
from opdlm.common.data.reranking import RerankCase
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import Trajectory
from tests.tiny import save_teacher


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    convert_checkpoint(save_teacher(folder / "teacher"), folder / "student", 4, "response")
    return str(folder / "student")


def answered(student: str, text: str, ends: bool = True, index: int = 0) -> Trajectory:
    tokenizer = load_tokenizer(student)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if ends else [])]
    return Trajectory(
        index=index,
        prompt_id="prompts.jsonl:7",
        prompt_ids=np.array(tokenizer("1+2=", add_special_tokens=False)["input_ids"], dtype=np.int32),
        response_ids=np.array(ids, dtype=np.int32),
        reveal_step=np.arange(1, len(ids) + 1, dtype=np.int32),
        response_length=len(ids),
        weight_version=0,
        finish_reason="eos" if ends else "length",
        denoising_steps=len(ids),
    )


def judge(actor: RewardActor, group: list[Trajectory], reference, others=()):
    """Judges the responses of one list."""
    return actor.judge([(0, place) for place in range(len(group))], reference, others, group)


def test_a_group_gets_advantages_and_an_equal_one_none(student) -> None:
    actor = RewardActor(student, RewardConfig(), "group_mean")
    judged, stats = judge(actor, [answered(student, text) for text in ("3", "4", "5", "3")], "3")
    assert [sample.targets.advantage for sample in judged] == [0.5, -0.5, -0.5, 0.5]
    assert stats.rewards == (1, 0, 0, 1)
    assert not stats.is_equal
    judged, stats = judge(actor, [answered(student, "9")] * 4, "3")
    assert [sample.targets.advantage for sample in judged] == [None] * 4
    assert stats.is_equal


def test_a_response_that_comes_again_is_judged_among_the_others(student) -> None:
    actor = RewardActor(student, RewardConfig(), "group_mean")
    judged, stats = judge(actor, [answered(student, "3")], "3", others=[0.0, 0.0, 1.0])
    assert [sample.targets.advantage for sample in judged] == [0.5]
    assert stats.rewards == (1,)


def test_responses_come_from_several_lists(student) -> None:
    actor = RewardActor(student, RewardConfig(), "group_mean")
    first, second = [answered(student, "3", index=i) for i in range(3)], [answered(student, "4", index=7)]
    judged, stats = actor.judge([(1, 0), (0, 2)], "3", [], first, second)
    assert [sample.trajectory.index for sample in judged] == [7, 2]
    assert stats.rewards == (0, 1)


def test_a_response_that_does_not_end_is_not_exact(student) -> None:
    actor = RewardActor(student, RewardConfig(), "group_mean")
    _, stats = judge(actor, [answered(student, "3"), answered(student, "3", ends=False)], "3")
    assert stats.rewards == (1, 0)


def test_failures_of_cases_are_counted(student) -> None:
    actor = RewardActor(student, RewardConfig(kind="rerank"), "group_std")
    case = RerankCase(("1", "2"), "2")
    _, stats = judge(actor, [answered(student, "2"), answered(student, "3", ends=False)], case)
    assert stats.rewards == (-1, -1)
    assert stats.failures == ("unparsable", "too_long")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of rewards; yields a function that makes an actor of one of them."""
    (tmp_path / "own_rewards.py").write_text(
        "def length(attempt):\n    return -len(attempt.response)\n"
        "def broken(attempt):\n    return 1 / 0\n"
        "def slow(attempt):\n    while True:\n        pass\n"
        "def nothing(attempt):\n    pass\n"
        "LIMIT = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda student, name, limit=10: RewardActor(
        student,
        RewardConfig(kind="python", function=f"own_rewards:{name}", time_limit_seconds=limit),
        "group_mean",
    )
    sys.modules.pop("own_rewards", None)


def test_a_function_of_the_users_own(student, module) -> None:
    _, stats = judge(module(student, "length"), [answered(student, "333"), answered(student, "3")], None)
    assert stats.rewards == (-3, -1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"own_rewards:broken: ZeroDivisionError: division by zero \(line 4 of .*own_rewards.py\)"),
        ("slow", r"the reward took more than reward.time_limit_seconds 0.2; make it faster, or raise it"),
        ("nothing", r"own_rewards:nothing returned None; expected a finite number"),
    ],
)
def test_what_goes_wrong_names_the_sample(student, module, name, message) -> None:
    actor = module(student, name, limit=0.2 if name == "slow" else 10)
    with pytest.raises(OpdlmError, match=r"reward: sample 5 \(prompts.jsonl:7\): " + message):
        judge(actor, [answered(student, "3", index=5)], None)


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "AttributeError"), ("LIMIT", "own_rewards:LIMIT is int; expected a function")],
)
def test_a_function_that_is_none(student, module, name, message) -> None:
    with pytest.raises(ConfigError, match=message):
        module(student, name)
