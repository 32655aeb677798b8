"""In a run: how close the student's answers to `evaluation.data` are to its teacher's.

The teacher's greedy answers are decoded once and kept in `RUN/teacher_answers.json`, so a resumed run has them. The
teacher actors score the student's answers, and an actor that holds the student's weights computes the KL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from opdlm.actors.pool import ActorPool
from opdlm.common.batches import in_groups
from opdlm.common.config import OpdlmConfig
from opdlm.common.files import write_json
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.model.load import load_output_matrix
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import HiddenTargets, ScoredTrajectory, Trajectory, WeightHandle
from opdlm.deploy.evaluate.against_teacher import likeness, summed_kl
from opdlm.deploy.evaluate.exam import Exam
from opdlm.deploy.evaluate.held_out import EvaluationResult

_SCORED_AT_ONCE = 64


class BesideTeacher:
    """Adds the comparison with the teacher to results.

    Args:
        form: the student's.
        tokens: the tokens that teacher and student share.
    """

    def __init__(self, config: OpdlmConfig, teachers: ActorPool, form: StudentForm, tokens: TokenIds) -> None:
        self._config, self._teachers, self._form, self._tokens = config, teachers, form, tokens
        self._file = Path(config.run.dir) / "teacher_answers.json"
        self._answers: dict[str, list[int]] | None = None

    def keep(self, exam: Exam, responses: Sequence[np.ndarray]) -> None:
        """Keeps the teacher's greedy answers to an exam, for this run and a resumed one."""
        if exam.known is None:
            return
        answers = self._known_answers()
        for ids, response in zip(exam.known.prompt_ids, exam.of_known(responses), strict=True):
            answers[self._key(ids)] = response.tolist()
        write_json(self._file, answers)

    async def add(
        self,
        exam: Exam,
        result: EvaluationResult,
        trajectories: Sequence[Trajectory],
        pool: ActorPool,
        handle: WeightHandle,
    ) -> EvaluationResult:
        """The result with the comparison of its answers to `evaluation.data`; as it is without them, or a teacher.

        Args:
            trajectories: of all requests of the exam, in their order.
            pool: actors that hold the student, or take it from the handle.

        Raises:
            WeightsLost: the version died meanwhile.
        """
        if exam.known is None or not self._teachers.actors:
            return result
        own = exam.of_known(trajectories)
        theirs = await self._teacher_answers(exam.known.prompt_ids)
        like = likeness([t.response for t in own], theirs)
        marks = exam.known.mark(theirs)
        score = float(marks.right.mean())
        return replace(
            result,
            of_teacher=(result.data_right or 0.0) / score if score else None,
            by_kind={k: of | {"teacher_right": marks.by_kind[k]["right"]} for k, of in result.by_kind.items()},
            agreement=like.agreement,
            token_agreement=like.token_agreement,
            length_ratio=like.length_ratio,
            held_out_kl=await self._held_out_kl(own, pool, handle),
        )

    async def _teacher_answers(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        answers, settings = self._known_answers(), self._config.evaluation
        missing = [ids for ids in prompts if self._key(ids) not in answers]
        if missing:
            arguments = (missing, settings.max_new_tokens, settings.batch_size)
            _, (responses, _) = await self._teachers.call("generate", *arguments)
            answers |= {self._key(ids): r.tolist() for ids, r in zip(missing, responses, strict=True)}
            write_json(self._file, answers)
        return [np.array(answers[self._key(ids)], dtype=np.int32) for ids in prompts]

    async def _held_out_kl(
        self, trajectories: Sequence[Trajectory], pool: ActorPool, handle: WeightHandle
    ) -> float | None:
        config, total, positions = self._config, 0.0, 0
        grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
        for part in in_groups(trajectories, _SCORED_AT_ONCE):
            places = [(0, place) for place in range(len(part))]
            (scored,), _ = await self._teachers.fetch("score", places, len(part), None, part, outputs=1)
            arguments = (scored, config.model.teacher, config.teacher.dtype, grid, self._form, self._tokens)
            _, (nats, count) = await pool.call("use_student", kl_on_actor, handle, *arguments)
            total, positions = total + nats, positions + count
        return total / positions if positions else None

    def _known_answers(self) -> dict[str, list[int]]:
        if self._answers is None:
            self._answers = json.loads(self._file.read_text()) if self._file.exists() else {}
        return self._answers

    def _key(self, prompt_ids: np.ndarray) -> str:
        """Of a prompt and of the longest answer to it."""
        text = f"{self._config.evaluation.max_new_tokens} {prompt_ids.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def kl_on_actor(
    student: Any,
    mask_id: int,
    scored: Sequence[ScoredTrajectory],
    teacher: str,
    dtype: str,
    grid: BlockGrid,
    form: StudentForm,
    tokens: TokenIds,
) -> tuple[float, int]:
    """`summed_kl` on a rollout actor. `teacher`, `dtype`: whose output matrix is read, for hidden-state targets."""
    hidden = any(isinstance(one.targets, HiddenTargets) for one in scored)
    head = load_output_matrix(teacher, dtype) if hidden else None
    return summed_kl(student, mask_id, scored, head, grid, form, tokens)
