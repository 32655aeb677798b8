"""Re-ranking: answers, rewards, metrics, and the task. `pytest tests/common/data/test_reranking.py`"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from opdlm.common.data.reranking import (
    BY_RANK,
    RerankAnswer,
    RerankCase,
    paired_interval,
    ranks,
    read_answer,
    rerank_metrics,
    rerank_reward,
)
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.data.tasks.rerank import CANDIDATES, KINDS, LEVELS

CASE = RerankCase(("a1", "b2", "c3", "d4"), target="c3")


@pytest.mark.parametrize(
    ("response", "has_ended", "failure"),
    [
        ("why#c3,a1,b2,d4", True, None),
        ("#c3, a1 ,b2,d4", True, None),
        ("a#b2#c3,a1,b2,d4", True, None),
        ("why#c3,a1,b2,d4", False, "too_long"),
        ("why#c3,,b2", False, "too_long"),
        ("c3,a1,b2,d4", True, "unparsable"),
        ("", True, "unparsable"),
        ("why#", True, "unparsable"),
        ("why#c3,,x9,c3", True, "unparsable"),
        ("why#c3,x9,c3", True, "out_of_set"),
        ("why#c3,c3,a1", True, "duplicate"),
        ("why#c3,a1", True, "omitted"),
    ],
)
def test_an_answer_has_one_failure_the_first_that_applies(response, has_ended, failure) -> None:
    answer = read_answer(CASE, response, has_ended)
    assert answer.failure == failure
    assert (answer.order == ("c3", "a1", "b2", "d4")) is (failure is None)


@pytest.mark.parametrize(
    ("order", "target", "reward"),
    [
        ("c3,a1,b2,d4", "c3", 2 / 4 + 0.2),  # rose
        ("a1,b2,c3,d4", "c3", 0.0),  # stays, but not first
        ("a1,b2,d4,c3", "c3", -1 / 4),  # fell
        ("a1,d4,b2,c3", "a1", 0.2),  # first and stays first
        ("b2,a1,c3,d4", "a1", -1 / 4),
    ],
)
def test_reward(order, target, reward) -> None:
    case = RerankCase(CASE.candidates, target)
    answer = read_answer(case, f"#{order}", True)
    assert rerank_reward(case, answer) == pytest.approx(reward)
    has_bonus = reward > 0
    assert rerank_reward(case, answer, validity_alone=True) == pytest.approx(reward + 0.2 * (not has_bonus))


def test_an_invalid_answer_costs_one_and_counts_as_the_input_order() -> None:
    invalid = RerankAnswer(None, "omitted")
    assert rerank_reward(CASE, invalid, validity_alone=True) == -1
    metrics = rerank_metrics([CASE, CASE], [invalid, RerankAnswer(("c3", "a1", "b2", "d4"))])
    assert ranks([CASE], [invalid]).tolist() == [3]
    assert (metrics["recall@1"], metrics["recall@3"], metrics["valid"], metrics["omitted"]) == (0.5, 1.0, 0.5, 0.5)
    assert metrics["ndcg@3"] == pytest.approx((1 / math.log2(4) + 1) / 2)
    assert metrics["copied"] == 0, "an invalid answer copies nothing"
    assert metrics["reward"] == pytest.approx((-1 + 0.7) / 2)


def test_ndcg_is_zero_beyond_k() -> None:
    assert BY_RANK["ndcg@3"](np.array([1, 3, 4])).tolist() == pytest.approx([1, 0.5, 0])


def test_paired_interval() -> None:
    """Cases that differ alike have a narrow interval, however much cases differ from each other."""
    spread = np.random.default_rng(1).normal(size=500)
    low, high = paired_interval(spread + 0.1, spread, resamples=200)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    low, high = paired_interval(spread, np.zeros(500), resamples=2000)
    assert low < spread.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * spread.std() / math.sqrt(500), rel=0.1)


def test_the_task_keeps_what_it_promises() -> None:
    task = get_task("rerank")
    found = list(itertools.islice(problems(task, "test", 0), 3000))
    cases = [problem.case for problem in found]
    rule = [read_answer(p.case, p.solution, True) for p in found]
    assert all(answer.order is not None for answer in rule)
    metrics = rerank_metrics(cases, rule)
    assert metrics["recall@1"] == pytest.approx(0.9, abs=0.02)
    as_retrieved = rerank_metrics(cases, [RerankAnswer(case.candidates) for case in cases])
    assert as_retrieved["recall@1"] == pytest.approx(0.3, abs=0.03)
    assert as_retrieved["copied"] == 1
    assert len({problem.prompt for problem in found}) > 2990
    for problem in found[:200]:
        assert len(set(problem.case.candidates)) == CANDIDATES
        assert set(problem.prompt + problem.solution) <= set(task.alphabet)
        assert task.is_correct(problem, problem.solution)
        assert not task.is_correct(problem, problem.solution[:-1])


def test_the_solution_follows_from_the_prompt_alone() -> None:
    """Another reading of the rule, from the text of the prompt."""
    task, rng = get_task("rerank"), random.Random(3)
    for _ in range(300):
        problem = task.draw(rng)
        history, listed = problem.prompt.removesuffix("=").split("|")
        items = [history[i : i + 2] for i in range(0, len(history), 2)]
        candidates = [listed[i : i + 2] for i in range(0, len(listed), 2)]
        (kind,) = [k for k in KINDS if sum(item[0] == k for item in items) == 3]
        levels = [int(item[1]) for item in items if item[0] == kind]
        wanted = (2 * levels[2] - levels[1]) % LEVELS

        def away(item: str, wanted: int = wanted) -> int:
            return min((int(item[1]) - wanted) % LEVELS, (wanted - int(item[1])) % LEVELS)

        of_kind = [c for c in candidates if c[0] == kind]
        reasoning = f"{kind}:{''.join(map(str, levels))}>{wanted};" + ",".join(f"{c}={away(c)}" for c in of_kind)
        order = sorted(of_kind, key=away) + [c for c in candidates if c[0] != kind]
        assert problem.solution == f"{reasoning}#{','.join(order)}"
