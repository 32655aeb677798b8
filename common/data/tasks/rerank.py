"""The task `rerank`: a recommender's candidates are put into a new order by a rule that the buyer's history follows.

An item is a letter, its kind, and a digit, its level: 200 items of two characters. The prompt is a history of six items
and ten candidates in a retriever's order, `c3f8c5b1c7t0|a1c8k4c9...=`. Three items of the history are of one kind, and
their levels go up or down by one step: the next one (modulo 10) is what the buyer looks for. The response says so, says
how far the candidates of this kind are from it, and gives the order: these candidates by their distance, then all
others as the retriever had them.

    c:357>9;c8=1,c9=0,c5=4#c9,c8,c5,a1,k4,...

The target is the rule's first candidate in nine cases of ten, and any other one in the tenth, so no order is right
always. The retriever has it first in three cases of ten.
"""

from __future__ import annotations

import random

from opdlm.common.data.reranking import ANSWER_MARK, SEPARATOR, RerankCase
from opdlm.common.data.tasks.base import Problem

KINDS = "abcdefghijklmnopqrst"
LEVELS = 10
CANDIDATES = 10
_HISTORY, _OF_ONE_KIND = 6, 3
_OBEYS_THE_RULE = 0.9
_RETRIEVED_FIRST = 0.3


class RerankTask:
    """Re-ranks ten candidates by a rule of the history (METHOD.md section 10, the synthetic case)."""

    name = "rerank"
    alphabet = KINDS + "0123456789|=:>;" + SEPARATOR + ANSWER_MARK

    def draw(self, rng: random.Random) -> Problem:
        """Draws a history, candidates, the target and the retriever's order."""
        kind = rng.choice(KINDS)
        step, first = rng.choice([-3, -2, -1, 1, 2, 3]), rng.randrange(LEVELS)
        levels = [(first + i * step) % LEVELS for i in range(_OF_ONE_KIND + 1)]
        wanted = levels.pop()
        other_kinds = rng.sample([other for other in KINDS if other != kind], _HISTORY - _OF_ONE_KIND)
        history = [f"{other}{rng.randrange(LEVELS)}" for other in other_kinds]
        for place, level in zip(sorted(rng.sample(range(_HISTORY), _OF_ONE_KIND)), levels, strict=True):
            history.insert(place, f"{kind}{level}")
        # Each distance at most once, so that the rule leaves no tie.
        of_kind = [(wanted + rng.choice([-1, 1]) * d) % LEVELS for d in rng.sample(range(LEVELS // 2), _OF_ONE_KIND)]
        others = [f"{other}{level}" for other in KINDS if other != kind for level in range(LEVELS)]
        candidates = [f"{kind}{level}" for level in of_kind] + rng.sample(others, CANDIDATES - _OF_ONE_KIND)
        best = min(candidates[:_OF_ONE_KIND], key=lambda item: _distance(item, wanted))
        obeys = rng.random() < _OBEYS_THE_RULE
        target = best if obeys else rng.choice([item for item in candidates if item != best])
        candidates.remove(target)
        rng.shuffle(candidates)
        is_first = rng.random() < _RETRIEVED_FIRST
        candidates.insert(0 if is_first else rng.randrange(1, CANDIDATES), target)
        prompt = f"{''.join(history)}|{''.join(candidates)}="
        case = RerankCase(tuple(candidates), target)
        return Problem(prompt, _solution(kind, levels, wanted, candidates), case=case)

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether the reasoning and the order are the rule's, character by character."""
        return response == problem.solution


def _distance(item: str, wanted: int) -> int:
    difference = abs(int(item[1]) - wanted)
    return min(difference, LEVELS - difference)


def _solution(kind: str, levels: list[int], wanted: int, candidates: list[str]) -> str:
    of_kind = [item for item in candidates if item[0] == kind]
    order = sorted(of_kind, key=lambda item: _distance(item, wanted)) + [c for c in candidates if c[0] != kind]
    distances = SEPARATOR.join(f"{item}={_distance(item, wanted)}" for item in of_kind)
    return f"{kind}:{''.join(map(str, levels))}>{wanted};{distances}{ANSWER_MARK}{SEPARATOR.join(order)}"
