"""Answers beside the teacher's: likeness, KL on the student's rollouts, `opdlm eval --teacher`, and the same in a run.

`pytest tests/deploy/evaluate/test_against_teacher.py`
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.actor import RolloutActor
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.actor import TeacherActor
from opdlm.actors.teacher.scoring import score
from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.form import PAPER_FORM
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import block_causal
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.load import hidden_states, load_model
from opdlm.common.types import ScoredTrajectory, Trajectory
from opdlm.deploy.evaluate.against_teacher import likeness, summed_kl
from opdlm.deploy.evaluate.beside_teacher import BesideTeacher
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.during_run import evaluate_student, evaluate_teacher
from opdlm.deploy.evaluate.exam import Exam, load_known
from opdlm.deploy.observe.progress import RunProgress
from opdlm.learner.states import BlockStates, one_state_per_block
from tests.deploy.cli.test_cli import opdlm
from tests.fakes.actors import Remote
from tests.tiny import request, save_teacher

ROWS = [
    {"prompt": "1+2=", "answers": ["3", "4"], "mark": "contains", "kind": "sum"},
    {"prompt": "30-4+5=", "answers": ["5"], "mark": "contains", "kind": "sum"},
    {"prompt": "7+7=", "answers": ["1"], "mark": "contains", "kind": "rest"},
    {"prompt": "12-3=", "answers": ["0"], "mark": "exact", "kind": "rest"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher, and a student that was made from another teacher."""
    root = tmp_path_factory.mktemp("beside")
    teacher, other = save_teacher(root / "teacher"), save_teacher(root / "other", seed=1)
    convert_checkpoint(other, root / "student", 4, "absolute")
    return teacher, root / "student"


@pytest.fixture
def questions(tmp_path) -> Path:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_likeness_counts_tokens_in_their_places() -> None:
    ours = [np.array([1, 2, 3]), np.array([1, 9]), np.array([5, 6, 7, 8]), np.array([4])]
    theirs = [np.array([1, 2, 3]), np.array([1, 2, 3, 4]), np.array([5, 0]), np.array([9])]
    like = likeness(ours, theirs)
    assert like.agreement == 0.25
    assert like.token_agreement == pytest.approx((1 + 1 / 4 + 1 / 2 + 0) / 4)
    assert like.length_ratio == pytest.approx((1 + 0.5 + 2 + 1) / 4)


def brute_force(teacher, student, trajectory: Trajectory, grid: BlockGrid, mask_id: int, size: int) -> list[float]:
    """KL at each masked position of the drawn states: one forward a block, with a dense mask, without a cache."""
    prompt, response = trajectory.prompt_ids.astype(np.int64), trajectory.response_ids.astype(np.int64)
    whole = torch.from_numpy(np.concatenate([prompt, response]))[None]
    states = BlockStates(trajectory.reveal_step, len(prompt), grid)
    masked = one_state_per_block(states, np.random.default_rng([0, trajectory.index]))[0].masked
    target = teacher(whole).logits[0, :, :size].log_softmax(-1)
    found = []
    for block in range(states.block.max() + 1):
        end = len(prompt) + int(np.flatnonzero(states.block == block)[-1]) + 1
        ids = whole[:, :end].clone()
        places = np.flatnonzero(masked & (states.block == block)).tolist()
        ids[0, [len(prompt) + i for i in places]] = mask_id
        positions = torch.arange(end)[None]
        blocks = (positions + grid.offset(len(prompt))) // grid.block_size
        hidden = hidden_states(student, ids, positions, block_causal(blocks, blocks))
        said = student.lm_head(hidden)[0, :, :size].log_softmax(-1)
        for i in (i for i in places if i < trajectory.response_length):
            p = target[len(prompt) + i - 1]
            found.append(float((p.exp() * (p - said[len(prompt) + i])).sum()))
    return found


@pytest.mark.parametrize("kind", ["absolute", "response"])
@torch.no_grad()
def test_kl_is_that_of_brute_force(folders, kind) -> None:
    decoder = CheckpointDecoder(folders[1])
    settings = replace(decoder.base.greedy("low_confidence_dynamic"), block_grid=kind, threshold=0.3)
    requests = [request(length, i, 11, vocab=17) for i, length in enumerate((3, 4, 5, 9))]
    trajectories, _ = decoder.decode(requests, settings, 4)
    teacher, grid, tokens = load_model(folders[0]), BlockGrid(4, kind), CheckpointDecoder(folders[0]).facts.tokens
    expected = [
        value
        for t in trajectories
        for value in brute_force(teacher, load_model(folders[1]), t, grid, decoder.facts.mask_id, tokens.end)
    ]
    for how in ("hidden", "logits"):
        targets = score(teacher, trajectories, how, 0, 100, tokens)
        scored = [ScoredTrajectory(t, target) for t, target in zip(trajectories, targets, strict=True)]
        student, mask_id, head = load_model(folders[1]), decoder.facts.mask_id, teacher.lm_head.weight
        total, positions = summed_kl(student, mask_id, scored, head, grid, PAPER_FORM, tokens)
        assert positions == len(expected) > 20
        assert total == pytest.approx(sum(expected), rel=1e-4)


def test_eval_beside_a_teacher(folders, questions, tmp_path) -> None:
    teacher, student = folders
    asked = ("--data", questions, "--max-new-tokens", 9, "--output", tmp_path / "o.json", "--samples", 2)
    text = opdlm("eval", student, *asked, "--teacher", teacher)
    assert "beside the teacher's greedy answers" in text
    assert "right answers of each kind" in text
    assert "(accepted: " in text
    written = json.loads((tmp_path / "o.json").read_text())
    first, static, dynamic = written["rows"]
    assert [row["decoding"] for row in written["rows"]] == [
        "teacher",
        "low_confidence_static",
        "low_confidence_dynamic",
    ]
    assert first["tokens_per_step"] == 1
    assert first["by_kind"].keys() == {"sum", "rest"} == static["by_kind"].keys()
    assert sum(of["questions"] for of in dynamic["by_kind"].values()) == 4
    for row in (static, dynamic):
        assert row["held_out_kl"] > 0.01
        assert 0 <= row["agreement"] <= row["token_agreement"] <= 1
        assert row["length_ratio"] > 0
    assert [sample["kind"] for sample in written["samples"]] == ["sum", "rest"]
    assert written["samples"][0]["answers"].keys() == {row["decoding"] for row in written["rows"]}


def test_a_teacher_beside_itself(folders, questions, tmp_path) -> None:
    opdlm("eval", folders[0], "--data", questions, "--teacher", folders[0], "--output", tmp_path / "o.json")
    first, same = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert first["right"] == same["right"]
    assert (same["agreement"], same["token_agreement"], same["length_ratio"]) == (1, 1, 1)
    assert "held_out_kl" not in same


def test_prompt_lookup_writes_what_the_model_writes(folders, questions, tmp_path) -> None:
    """Beside itself: the drafts change the number of forwards, and no answer."""
    teacher, student = folders
    asked = ("--data", questions, "--max-new-tokens", 24, "--prompt-lookup", 4, "--output", tmp_path / "o.json")
    opdlm("eval", student, *asked, "--teacher", teacher)
    plain, looked_up, *others = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert (looked_up["decoding"], len(others)) == ("prompt lookup 4", 2)
    assert looked_up["agreement"] == 1
    assert looked_up["by_kind"] == plain["by_kind"]
    assert looked_up["tokens_per_step"] > 1, "a random model repeats itself"
    opdlm("eval", teacher, *asked)
    _, alone = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert alone["tokens_per_step"] == looked_up["tokens_per_step"]
    text = opdlm("eval", student, *asked, code=2)
    assert f"--prompt-lookup: {student} is a student; prompt lookup is for an autoregressive model" in text
    text = opdlm("eval", teacher, *asked, "--actors", 1, code=2)
    assert "--prompt-lookup: found with --actors 1; it is measured in this process" in text


def test_a_student_of_another_form(folders, questions, tmp_path) -> None:
    """With shift, causal context and blocks of one token an untrained student is its teacher."""
    convert_checkpoint(folders[0], tmp_path / "same", 1, "response", logit_shift=True, context="causal")
    options = ("--max-new-tokens", 9, "--strategy", "low_confidence_static", "--output", tmp_path / "o.json")
    opdlm("eval", tmp_path / "same", "--data", questions, "--teacher", folders[0], *options)
    _, row = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["agreement"] == 1
    assert row["held_out_kl"] == pytest.approx(0, abs=1e-5)


def test_misplaced_options_are_named(folders, questions, tmp_path) -> None:
    teacher, student = folders
    asked = ("--data", questions)
    text = opdlm("eval", student, *asked, "--teacher", student, code=2)
    assert f"--teacher: {student} is a student; give the autoregressive model" in text
    text = opdlm("eval", student, *asked, "--teacher", teacher, "--actors", 2, code=2)
    assert "--teacher: found with --actors 2; the KL needs both models in this process" in text
    other = save_teacher(tmp_path / "other", alphabet="0123456789+-=;abc")
    assert "other" in opdlm("eval", student, *asked, "--teacher", other, code=2)


class Live:
    """An actor's object in this process, with coroutines for methods."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str):
        async def method(*arguments):
            return getattr(self._target, name)(*arguments)

        return method


def test_an_evaluation_of_a_run_has_the_figures_of_opdlm_eval(folders, questions, tmp_path) -> None:
    teacher, student = folders
    config = config_from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "model": {"teacher": str(teacher), "dtype": "float32"},
            "teacher": {"dtype": "float32"},
            "data": {"task": "chain", "prompts": 8},
            "evaluation": {"data": str(questions), "max_new_tokens": 9, "limit": 2},
        }
    )
    opened = CheckpointDecoder(student)
    known, _ = load_known(config, opened.tokenizer, 50, opened.facts.eos_ids)
    exam, progress = Exam(None, known), RunProgress()
    settings = DecodeSettings.from_config(config.rollout).greedy("low_confidence_dynamic")
    teacher_actor = TeacherActor(str(teacher), TeacherConfig(dtype="float32"))
    rollout_actor = RolloutActor(str(student), "float32", 1)

    async def evaluate(exam: Exam, examine: bool):
        loop = asyncio.get_running_loop()
        teachers = ActorPool({"teacher-0": Remote(Live(teacher_actor), loop)}, 60, 0)
        rollouts = ActorPool({"rollout-0": Remote(Live(rollout_actor), loop)}, 60, 0)
        beside = BesideTeacher(config, teachers, PAPER_FORM, CheckpointDecoder(teacher).facts.tokens)
        if examine:
            await evaluate_teacher(teachers, exam, config.evaluation, progress, beside)
        asked = config.evaluation, "evaluation", progress, beside
        return await evaluate_student(rollouts, exam, None, settings, *asked)

    result = asyncio.run(evaluate(exam, examine=True))
    options = ("--data", questions, "--max-new-tokens", 9, "--strategy", "low_confidence_dynamic")
    opdlm("eval", student, *options, "--teacher", teacher, "--dtype", "float32", "--output", tmp_path / "o.json")
    first, row = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert result.data_right == row["right"] == result.exact_match
    assert result.held_out_kl == pytest.approx(row["held_out_kl"], rel=1e-5)
    for figure in ("agreement", "token_agreement", "length_ratio", "of_teacher"):
        assert getattr(result, figure) == pytest.approx(row[figure])
    for kind, of in result.by_kind.items():
        assert of["right"] == row["by_kind"][kind]["right"]
        assert of["teacher_right"] == first["by_kind"][kind]["right"]
    # A resumed run reads the teacher's answers; a run that did not examine the teacher asks for those that it needs.
    assert asyncio.run(evaluate(exam, examine=False)) == replace(result, tokens_per_second=pytest.approx(1, abs=1e9))
    (tmp_path / "teacher_answers.json").unlink()
    some = asyncio.run(evaluate(Exam(None, known.chosen(2)), examine=False))
    assert some.problems == 2
    assert len(json.loads((tmp_path / "teacher_answers.json").read_text())) == 2
