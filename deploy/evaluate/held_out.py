"""Held-out problems of built-in tasks, and how to mark answers to them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from opdlm.common.data.reranking import RerankAnswer, RerankCase, read_answer, rerank_metrics
from opdlm.common.data.tasks import Problem, Task, problems
from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.types import RolloutRequest

_TEST_SEED = 1


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The figures of one evaluation."""

    problems: int
    exact_match: float
    tokens_per_step: float
    """Response tokens per denoising step (1 for an autoregressive model)."""
    tokens_per_second: float
    """Response tokens per second of one actor."""
    by_task: dict[str, dict[str, float]]
    """By task: `exact_match`, `tokens_per_step`, and `token_match`, the share of the solution's tokens that the
    response has at the same positions. It shows how much of a skill remains where no whole answer is right. A
    re-ranking task also has its metrics (`common/data/reranking.py`)."""
    data_right: float | None = None
    """Share of right answers to the questions of `evaluation.data`; None without them, as all that follows."""
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind of these questions: `right`, the number of `questions`, and of a student `teacher_right`."""
    of_teacher: float | None = None
    """`data_right` as a share of the teacher's on the same questions; None where the teacher has none right."""
    agreement: float | None = None
    """This and the next two: how close the answers to these questions are to the teacher's (`against_teacher.py`)."""
    token_agreement: float | None = None
    length_ratio: float | None = None
    held_out_kl: float | None = None
    """KL(teacher || student) in nats on the student's answers to these questions, a mean over masked positions; each
    block is in one of its visited states."""


class HeldOutProblems:
    """Held-out problems of one or more tasks, with their token ids and the way to mark answers.

    Args:
        count: problems of each task.
        eos_ids: tokens that end a response. None: the tokenizer's.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        eos_ids: Collection[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._eos_ids = [tokenizer.eos_token_id] if eos_ids is None else eos_ids
        self.problems: list[tuple[Task, Problem]] = [
            (task, problem) for task in tasks for problem in _distinct_problems(task, count)
        ]
        encode = PromptEncoder(tokenizer)
        self.prompt_ids = [np.array(encode(p.prompt), dtype=np.int32) for _, p in self.problems]

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The problems as decode requests."""
        return [
            RolloutRequest(i, f"{task.name}/test/{i}", ids, max_new_tokens, seed=i)
            for i, ((task, _), ids) in enumerate(zip(self.problems, self.prompt_ids, strict=True))
        ]

    def solution_ids(self) -> list[np.ndarray]:
        """Token ids `[R] int64` of each right answer, without the end-of-sequence token."""
        return [np.array(self.tokenizer(p.solution, add_special_tokens=False)["input_ids"]) for _, p in self.problems]

    def exact_match(self, responses: Sequence[np.ndarray]) -> float:
        """Share of right answers; a response without an end-of-sequence token is wrong."""
        return float(self._right(responses).mean())

    def result(self, responses: Sequence[np.ndarray], steps: Sequence[int], seconds: float) -> EvaluationResult:
        """Marks the answers.

        Args:
            responses: `[R] int32` each, in the order of the problems.
            steps: denoising steps of each response.
            seconds: how long decoding took.
        """
        right, lengths = self._right(responses), np.array([len(r) for r in responses])
        tokens = np.array([_token_match(s, r) for s, r in zip(self.solution_ids(), responses, strict=True)])
        by_task = {}
        for name in dict.fromkeys(task.name for task, _ in self.problems):
            of = np.array([task.name == name for task, _ in self.problems])
            by_task[name] = {
                "exact_match": float(right[of].mean()),
                "token_match": float(tokens[of].mean()),
                "tokens_per_step": float(lengths[of].sum() / np.array(steps)[of].sum()),
            }
            places = np.flatnonzero(of)
            if cases := [case for place in places if (case := self.problems[place][1].case) is not None]:
                by_task[name] |= rerank_metrics(cases, self.reranked(responses, places))
        return EvaluationResult(
            problems=len(responses),
            exact_match=float(right.mean()),
            tokens_per_step=float(lengths.sum() / sum(steps)),
            tokens_per_second=float(lengths.sum() / seconds),
            by_task=by_task,
        )

    def cases(self) -> list[RerankCase]:
        """The cases of a re-ranking task; empty for any other."""
        return [problem.case for _, problem in self.problems if problem.case is not None]

    def reranked(self, responses: Sequence[np.ndarray], places: Sequence[int] | np.ndarray) -> list[RerankAnswer]:
        """What the responses to the problems at these places say, which all have a case."""
        found = []
        for place in places:
            case, ids = self.problems[place][1].case, responses[place]
            assert case is not None, "a problem of a re-ranking task"
            has_ended = self._has_ended(ids)
            found.append(read_answer(case, self.tokenizer.decode(ids[:-1] if has_ended else ids), has_ended))
        return found

    def _has_ended(self, ids: np.ndarray) -> bool:
        return len(ids) > 0 and ids[-1] in self._eos_ids

    def _right(self, responses: Sequence[np.ndarray]) -> np.ndarray:
        marks = [
            self._has_ended(ids) and task.is_correct(problem, self.tokenizer.decode(ids[:-1]))
            for (task, problem), ids in zip(self.problems, responses, strict=True)
        ]
        return np.array(marks, dtype=bool)


def _token_match(solution: np.ndarray, response: np.ndarray) -> float:
    shared = min(len(solution), len(response))
    return float((solution[:shared] == response[:shared]).sum() / len(solution))


def _distinct_problems(task: Task, count: int) -> list[Problem]:
    distinct = {p.prompt: p for p in itertools.islice(problems(task, "test", _TEST_SEED), 4 * count)}
    return list(distinct.values())[:count]
