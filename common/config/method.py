"""What is trained on and how: objective, schedules, curriculum (METHOD.md sections 4 to 7)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.base import NonNegativeInt, PositiveInt, Probability, Section


class ObjectiveConfig(Section):
    """Which states are trained on and how far the student is from the teacher there (METHOD.md sections 4, 5)."""

    selection: Literal["one_state_per_block", "one_state_per_response", "all_states", "random_mask"] = (
        "one_state_per_block"
    )
    """Which of a trajectory's states become training rows."""
    divergence: Literal["kl", "jsd"] = "kl"
    """`kl`: forward KL, mixed with reverse KL by `reverse_weight`; `jsd`: Jensen-Shannon with `jsd_alpha`."""
    reverse_weight: Probability = 0.0
    """w of (1-w) forward + w reverse KL: 0 forward only, 1 reverse only."""
    jsd_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the JSD's mixture."""
    top_k: NonNegativeInt = 0
    """0: over the full vocabulary; K: over the teacher's K likeliest tokens."""
    tail: Literal["drop", "bucket"] = "drop"
    """With top-K: forget the remaining mass (the release), or carry it as one more outcome (a true divergence)."""
    exclude_eos: bool = True
    """Take no loss at the end-of-sequence token (the release's default)."""
    reduction: Literal["row", "token"] = "row"
    """`row`: mean over a row's loss positions, then over rows; `token`: mean over all positions of the batch."""


class Schedule(Section):
    """A number that moves from `start` to `end` over the first `rounds` rounds, then stays."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """`linear`: the paper's; `cosine`: `start + (end - start)(1 - cos(pi/2 s/rounds))`, the release's."""
    start: float
    """Value in round 0."""
    end: float | None = None
    """Value from round `rounds` on. Empty for `constant`."""
    rounds: PositiveInt | None = None
    """Rounds until `end` is reached. Empty for `constant`."""


class CurriculumConfig(Section):
    """What grows while the student learns (METHOD.md section 6)."""

    max_new_tokens: Schedule | None = None
    """Rollout length in tokens by round. Empty: `rollout.max_new_tokens` throughout."""
    threshold: Schedule | None = None
    """Dynamic threshold by round. Empty: `rollout.threshold` throughout."""
    max_new_tokens_per_domain: dict[str, PositiveInt] = Field(default_factory=dict)
    """Length caps by a prompt's domain, in tokens (paper: math 4096, code and chat 2048, science 1024)."""
