"""Re-ranking: what an answer is, what it is worth, and how many answers are measured (METHOD.md section 10).

A case is a prompt with N candidates in a retriever's order, one of which is the target. An answer ends with a new order
of the candidates' ids, behind an optional reasoning: `c:357>9;c8=1,c9=0#c9,c8,a1`. An answer that is no such order is
invalid, and counts as the retriever's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Failure = Literal["too_long", "unparsable", "out_of_set", "duplicate", "omitted"]
"""Why an answer is invalid: it has no end; it has no order, or an empty id in it; or its order has an id that is no
candidate, has one twice, or lacks one. The first of these that applies is the answer's only failure."""
FAILURES: tuple[Failure, ...] = get_args(Failure)

ANSWER_MARK = "#"
"""Between reasoning and order. Where it occurs several times, the last one counts."""
SEPARATOR = ","
"""Between two ids of the order."""

_ROSE = 0.2
"""Reward for a target that rises, or is first and stays first."""
_INVALID = -1.0
"""Reward of an invalid answer."""


@dataclass(frozen=True, slots=True)
class RerankCase:
    """Candidates in the retriever's order, and the target among them."""

    candidates: tuple[str, ...]
    target: str


Reference = str | RerankCase
"""What a response is compared with: the right response, or a case."""


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """What a response says: an order of all candidates, or why it is none."""

    order: tuple[str, ...] | None
    failure: Failure | None = None


def read_answer(case: RerankCase, response: str, has_ended: bool) -> RerankAnswer:
    """Reads the order out of a response.

    Args:
        response: text without the end-of-sequence token.
        has_ended: whether the response ended with that token, not at its length limit.
    """
    if not has_ended:
        return RerankAnswer(None, "too_long")
    _, mark, text = response.rpartition(ANSWER_MARK)
    order = tuple(part.strip() for part in text.split(SEPARATOR))
    if not mark or not all(order):
        return RerankAnswer(None, "unparsable")
    if not set(order) <= set(case.candidates):
        return RerankAnswer(None, "out_of_set")
    if len(set(order)) < len(order):
        return RerankAnswer(None, "duplicate")
    if len(order) < len(case.candidates):
        return RerankAnswer(None, "omitted")
    return RerankAnswer(order)


def rerank_reward(case: RerankCase, answer: RerankAnswer, validity_alone: bool = False) -> float:
    """By how much the target rose, as a share of N, and 0.2 if it rose or stays first; -1 for an invalid answer.

    Args:
        validity_alone: give the 0.2 to every valid answer. Not the paper's reward: it teaches the model to copy the
            input order, and is there to show that.
    """
    if answer.order is None:
        return _INVALID
    before, after = case.candidates.index(case.target), answer.order.index(case.target)
    rose = validity_alone or after < before or before == after == 0
    return (before - after) / len(case.candidates) + _ROSE * rose


def ranks(cases: Sequence[RerankCase], answers: Sequence[RerankAnswer]) -> np.ndarray:
    """The target's rank in each answer, `[cases]` int64 from 1. An invalid answer counts as the retriever's order."""
    pairs = zip(cases, answers, strict=True)
    return np.array([(answer.order or case.candidates).index(case.target) + 1 for case, answer in pairs])


def recall_at(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """Recall@k of each case by its rank: 1 where the target is among the first k."""
    return lambda rank: (rank <= k).astype(np.float64)


def ndcg_at(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """NDCG@k of each case by its rank: 1 / log2(rank + 1) where the target is among the first k, else 0."""
    return lambda rank: np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)


BY_RANK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recall@1": recall_at(1),
    "recall@3": recall_at(3),
    "recall@5": recall_at(5),
    "ndcg@3": ndcg_at(3),
    "ndcg@5": ndcg_at(5),
}
"""Metrics of a case by the target's rank: `[cases]` ranks -> `[cases]` values."""


def rerank_metrics(cases: Sequence[RerankCase], answers: Sequence[RerankAnswer]) -> dict[str, float]:
    """All metrics over cases whose target is among the candidates, as means.

    Returns: `BY_RANK`; `valid`, the share of valid answers; the share of each failure; `copied`, the share of answers
        that are the input order; `reward`.
    """
    rank = ranks(cases, answers)
    pairs = list(zip(cases, answers, strict=True))
    shares: dict[str, float] = {
        failure: float(np.mean([answer.failure == failure for answer in answers])) for failure in FAILURES
    }
    return {
        **{name: float(metric(rank).mean()) for name, metric in BY_RANK.items()},
        "valid": float(np.mean([answer.order is not None for answer in answers])),
        **shares,
        "copied": float(np.mean([answer.order == case.candidates for case, answer in pairs])),
        "reward": float(np.mean([rerank_reward(case, answer) for case, answer in pairs])),
    }


def paired_interval(
    ours: np.ndarray, theirs: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % interval of the mean of `ours - theirs` by resampling cases (paired bootstrap, percentiles).

    Args:
        ours, theirs: `[cases]` values of one metric for the same cases.
    """
    difference, rng = np.asarray(ours) - np.asarray(theirs), np.random.default_rng(seed)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
