"""Runs in lossless mode: adapters learn to draft, answers stay the teacher's. `pytest tests/system/test_lossless.py`"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from opdlm.common.config import OpdlmConfig
from opdlm.common.model.adapters import adapter_parameters
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.options import QuestionOptions
from opdlm.deploy.evaluate.questions import open_questions
from opdlm.deploy.observe.report import VERIFIED
from tests.system.runs import ROUNDS, assert_sound, losses, records_of, run_config, run_until, train_here

pytestmark = pytest.mark.ray


def lossless_config(teacher: Path, run_dir: Path, /, **sections) -> OpdlmConfig:
    """Drafts of three masks, adapters of rank 4."""
    base = {
        "model": {"logit_shift": True, "context": "causal", "lora": {"rank": 4, "tokens": "noisy"}},
        "rollout": {"block_size": 3, "block_grid": "response", "strategy": "verified", "temperature": 0.0},
        "objective": {"selection": "drafts"},
        "learner": {"optimizer": {"lr": 1e-2}},
    }
    shared = run_config(teacher, run_dir).model_dump(mode="json", exclude_unset=True)
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return run_config(teacher, run_dir, **{name: shared.get(name, {}) | section for name, section in base.items()})


@pytest.fixture(scope="module")
def unbroken(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("lossless") / "unbroken"
    train_here(lossless_config(chain_teacher, run_dir))
    return run_dir


def test_a_run_trains_adapters_and_changes_no_answer(unbroken, chain_teacher) -> None:
    assert_sound(unbroken)
    rounds, publishes = records_of(unbroken, "round"), records_of(unbroken, "publish")
    assert len(rounds) == ROUNDS
    assert all("teacher_tokens_per_second" not in record for record in rounds), "the clean path is the teacher"
    assert all(0 <= record["draft_2_accepted_share"] <= record["draft_1_accepted_share"] <= 1 for record in rounds)
    assert VERIFIED in {record["row"] for record in records_of(unbroken, "evaluation")}
    student = CheckpointDecoder(unbroken / "student")
    start = load_model(unbroken / "student_init")
    trained = dict(adapter_parameters(student.model))
    assert publishes[-1]["nbytes"] == sum(4 * parameter.numel() for parameter in trained.values())
    assert all(not parameter.equal(trained[name]) for name, parameter in adapter_parameters(start))
    teacher = CheckpointDecoder(chain_teacher)
    questions = open_questions(QuestionOptions(task="chain", problems=50), student).requests(12)
    ours = student.answer(questions, student.base.greedy("verified"), 16).responses
    theirs = teacher.answer(questions, teacher.base, 16).responses
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs]
    assert read_facts(unbroken / "student").has_noisy_adapters


@pytest.mark.nightly
def test_the_driver_dies_and_the_run_is_resumed(unbroken, chain_teacher, tmp_path) -> None:
    """Nightly: `test_run.py` has a driver die, and `tests/learner/test_zero.py` has adapters resume to the bit."""
    config = lossless_config(chain_teacher, tmp_path / "run")
    assert run_until(config, False, 2, signal.SIGKILL) == -signal.SIGKILL
    train_here(config, resume=True)
    assert_sound(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(unbroken)


def test_a_second_run_goes_on_with_the_first_ones_student(unbroken, chain_teacher, tmp_path) -> None:
    """One round of it shows where it begins."""
    given = {
        "run": {"rounds": 1},
        "model": {"student": str(unbroken / "student"), "lora": {"rank": 4, "tokens": "noisy"}},
        "learner": {"workers": 1, "optimizer": {"lr": 1e-2}},
        "evaluation": {"final_problems": 0},
    }
    train_here(lossless_config(chain_teacher, tmp_path / "run", **given))
    first, second = (records_of(folder, "step") for folder in (unbroken, tmp_path / "run"))
    assert second[0]["loss"] < first[0]["loss"]
