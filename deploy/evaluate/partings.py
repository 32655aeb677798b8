"""Where answers that should be the teacher's part from them, and how near to a tie the teacher is there.

Drafts that the teacher verifies give the teacher's own answer, but another forward adds its numbers in another order,
so a tie within the number format's precision may fall the other way (docs/lossless.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opdlm.actors.teacher.scoring import score
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import RolloutRequest, TopKTargets, Trajectory


@dataclass(frozen=True, slots=True)
class Partings:
    """The first tokens that differ. A gap is between the teacher's two best logits, in one forward over its answer."""

    answers: int
    """Answers with a token that differs."""
    median_gap: float
    largest_gap: float
    among_two_best: float
    """Share of them in which the answer has one of the teacher's two best tokens at that place."""
    median_gap_of_all: float
    """Median over all tokens of all answers of the teacher, for comparison."""


def partings(
    teacher: Any,
    requests: Sequence[RolloutRequest],
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    batch_tokens: int,
    tokens: TokenIds,
) -> Partings | None:
    """Compares answers `[R] int32` with the teacher's greedy ones to the same requests; None where all are the same.

    Args:
        teacher: a causal LM of transformers in eval mode, in the number format that is asked about.
        batch_tokens: most tokens in one forward.
        tokens: the tokens of the teacher.
    """
    first = [_first_difference(*pair) for pair in zip(ours, theirs, strict=True)]
    differing = {i: place for i, place in enumerate(first) if place is not None}
    if not differing:
        return None
    answered = [_as_trajectory(request, ids) for request, ids in zip(requests, theirs, strict=True)]
    gaps, chosen, everywhere = [], 0, list[np.ndarray]()
    for i, best in enumerate(score(teacher, answered, "topk", 2, batch_tokens, tokens)):
        assert isinstance(best, TopKTargets), "of the kind that was asked for"
        of_answer = best.logprobs[:, 0] - best.logprobs[:, 1]
        everywhere.append(of_answer)
        if i in differing:
            place = differing[i]
            gaps.append(of_answer[place])
            chosen += int(ours[i][place] in best.token_ids[place])
    return Partings(
        answers=len(gaps),
        median_gap=float(np.median(gaps)),
        largest_gap=float(np.max(gaps)),
        among_two_best=chosen / len(gaps),
        median_gap_of_all=float(np.median(np.concatenate(everywhere))),
    )


def _first_difference(ours: np.ndarray, theirs: np.ndarray) -> int | None:
    """The first place at which both have a token, and not the same one."""
    shared = min(len(ours), len(theirs))
    places = np.flatnonzero(ours[:shared] != theirs[:shared])
    return int(places[0]) if places.size else None


def _as_trajectory(request: RolloutRequest, ids: np.ndarray) -> Trajectory:
    """An answer of an autoregressive model as the decoder's record, one token a step."""
    return Trajectory(
        index=request.index,
        prompt_id=request.prompt_id,
        prompt_ids=request.prompt_ids,
        response_ids=ids,
        reveal_step=np.arange(1, len(ids) + 1, dtype=np.int32),
        response_length=len(ids),
        weight_version=0,
        finish_reason="length",
        denoising_steps=len(ids),
    )
