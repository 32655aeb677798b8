"""Exact match on held-out problems, over the run's own actors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.decode_settings import DecodeSettings
from actors.pool import ActorPool
from common.config.schema import EvaluationConfig
from common.tasks import Problem, Task, problems
from common.types import RolloutRequest, WeightHandle

_TEST_SEED = 1


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One row of the table."""

    problems: int
    exact_match: float
    tokens_per_step: float
    """Response tokens per denoising step (1 for an autoregressive model)."""
    tokens_per_second: float
    """Response tokens per second of one actor."""


class Exam:
    """Held-out problems, their token ids, and how to mark answers."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        self.task = task
        self.tokenizer = tokenizer
        distinct = {p.prompt: p for p in itertools.islice(problems(task, "test", _TEST_SEED), 4 * count)}
        self.problems: list[Problem] = list(distinct.values())[:count]
        self.prompt_ids = [
            np.array(tokenizer(p.prompt, add_special_tokens=False)["input_ids"], dtype=np.int32) for p in self.problems
        ]

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The problems as decode requests."""
        return [
            RolloutRequest(i, f"{self.task.name}/test/{i}", ids, max_new_tokens, seed=i)
            for i, ids in enumerate(self.prompt_ids)
        ]

    def exact_match(self, responses: Sequence[np.ndarray]) -> float:
        """Share of right answers; a response that did not end is wrong."""
        eos = self.tokenizer.eos_token_id
        right = 0
        for problem, ids in zip(self.problems, responses, strict=True):
            ended = len(ids) > 0 and ids[-1] == eos
            right += ended and self.task.is_correct(problem, self.tokenizer.decode(ids[:-1]))
        return right / len(self.problems)


async def evaluate_student(
    pool: ActorPool, exam: Exam, handle: WeightHandle, settings: DecodeSettings, config: EvaluationConfig
) -> EvaluationResult:
    """Decodes the exam over all rollout actors with one weight version."""
    requests = exam.requests(config.max_new_tokens)
    size = -(-len(requests) // len(pool.actors))
    parts = [requests[i : i + size] for i in range(0, len(requests), size)]
    done = await asyncio.gather(
        *(pool.call("decode", part, handle, settings, config.batch_size, outputs=len(part)) for part in parts)
    )
    trajectories: list[Any] = [await ref for refs, _ in done for ref in refs]
    stats = [stat for _, stat in done]
    tokens = sum(s.response_tokens for s in stats)
    return EvaluationResult(
        problems=len(requests),
        exact_match=exam.exact_match([t.response for t in trajectories]),
        tokens_per_step=tokens / sum(s.denoising_steps for s in stats),
        tokens_per_second=tokens / sum(s.seconds for s in stats),
    )


async def evaluate_teacher(pool: ActorPool, exam: Exam, config: EvaluationConfig) -> EvaluationResult:
    """Greedy autoregressive answers of the teacher."""
    _, (responses, seconds) = await pool.call("generate", exam.prompt_ids, config.max_new_tokens, config.batch_size)
    tokens = sum(len(r) for r in responses)
    return EvaluationResult(len(responses), exam.exact_match(responses), 1.0, tokens / seconds)
