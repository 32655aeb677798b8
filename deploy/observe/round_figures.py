"""The figures of a round: rates, shares and compute, from what the roles reported during it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opdlm.actors.reward.actor import RewardStats
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.data.reranking import FAILURES
from opdlm.common.types import DecodeStats

LEARNER_WORK = ("train_seconds", "publish_seconds", "checkpoint_seconds")
"""The durations in the learner's events. The rest of a round it waits for samples."""


@dataclass(slots=True)
class RoundReports:
    """What the roles reported during one round."""

    decoded: list[DecodeStats] = field(default_factory=list)
    scored: list[ScoreStats] = field(default_factory=list)
    judged: list[RewardStats] = field(default_factory=list)
    push_seconds: float = 0.0
    push_bytes: int = 0
    """What each rollout actor read in the push of the round's weights."""
    learner_seconds: float = 0.0
    """Sum of `LEARNER_WORK`."""

    def flops(self, train_forward_tokens: int, student_parameters: int, teacher_parameters: int) -> int:
        """Compute of the round as the paper counts it: 2N FLOP per token of a forward, 6N per trained token."""
        student = 2 * sum(s.forward_tokens for s in self.decoded) + 6 * train_forward_tokens
        teacher = 2 * sum(s.forward_tokens for s in self.scored)
        return student_parameters * student + teacher_parameters * teacher

    def figures(self, event: Mapping[str, Any], state: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The round's figures by metric name.

        Args:
            event: the learner's `round` event.
            state: has the numbers of actors, `rollout_actors` and `teacher_actors`.
            seconds: how long the round took.
        """
        decode_seconds = sum(s.seconds for s in self.decoded)
        score_seconds = sum(s.seconds for s in self.scored)
        figures: dict[str, Any] = {
            "round_seconds": seconds,
            "weight_push_seconds": self.push_seconds,
            "weight_push_bytes": self.push_bytes,
            "rollout_busy_seconds": decode_seconds,
            "teacher_busy_seconds": score_seconds,
            "learner_busy_seconds": self.learner_seconds,
            "learner_idle_share": idle_share(self.learner_seconds, 1, seconds),
            "learner_tokens_per_second": event["round_tokens"] / event["train_seconds"],
            "run_tokens_per_second": event["round_tokens"] / seconds,
            "rollout_forward_tokens": sum(s.forward_tokens for s in self.decoded),
            "teacher_forward_tokens": sum(s.forward_tokens for s in self.scored),
        }
        if sequences := sum(s.sequences for s in self.decoded):
            tokens = sum(s.response_tokens for s in self.decoded)
            ended = sum(s.ended_by_eos for s in self.decoded) / sequences
            figures |= {
                "rollout_tokens_per_second": tokens / decode_seconds,
                "rollout_tokens_per_forward": tokens / sum(s.forwards for s in self.decoded),
                "tokens_per_step": tokens / sum(s.denoising_steps for s in self.decoded),
                "response_tokens_mean": tokens / sequences,
                "ended_by_eos_share": ended,
                "ended_by_limit_share": 1 - ended,
                "continued_sequences": sum(s.continued_sequences for s in self.decoded),
                "continued_tokens": sum(s.continued_tokens for s in self.decoded),
                "version_spread_max": max(s.version_spread_max for s in self.decoded),
            }
        if slot_steps := sum(s.slot_steps for s in self.decoded):
            figures["rollout_slot_occupancy"] = sum(s.occupied_slot_steps for s in self.decoded) / slot_steps
            figures["rollout_waiting_requests_max"] = max(s.waiting_requests for s in self.decoded)
            figures["rollout_put_back"] = sum(s.put_back for s in self.decoded)
            figures["rollout_cache_positions_max"] = max(s.cache_positions for s in self.decoded)
            figures["rollout_cache_live_positions_max"] = max(s.cache_live_positions for s in self.decoded)
        figures |= _draft_figures([s.steps_by_tokens for s in self.decoded if any(s.steps_by_tokens)])
        if room_tokens := sum(s.room_tokens for s in self.scored):
            figures["teacher_batch_fill"] = figures["teacher_forward_tokens"] / room_tokens
        if self.scored:
            tokens = sum(s.tokens for s in self.scored)
            figures |= {
                "teacher_tokens_per_second": tokens / score_seconds,
                "target_bytes_per_token": sum(s.nbytes for s in self.scored) / tokens,
            }
        if self.judged:
            figures |= _reward_figures(self.judged)
        for role, busy_seconds in (("rollout", decode_seconds), ("teacher", score_seconds)):
            if actors := state.get(f"{role}_actors"):
                figures[f"{role}_idle_share"] = idle_share(busy_seconds, actors, seconds)
        return figures


def idle_share(busy_seconds: float, actors: int, seconds: float) -> float:
    """Share of `seconds` in which a role's actors did not do their work: 1 - busy / (actors x seconds).

    Rollout actors are busy while they decode, teacher actors while they score, and the learner's ranks (which work in
    step and count as one) while they train, publish and save. A call counts in the round in which it ended, so the busy
    seconds can exceed the round; the share is 0 then.
    """
    return max(1 - busy_seconds / (actors * seconds), 0.0)


def _reward_figures(judged: Sequence[RewardStats]) -> dict[str, float]:
    """Of the responses: mean and spread of their rewards, groups that teach nothing, and invalid answers by kind."""
    rewards = np.array([reward for stats in judged for reward in stats.rewards])
    failures = Counter(failure for stats in judged for failure in stats.failures)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_equal_groups_share": sum(stats.is_equal for stats in judged) / len(judged),
        "reward_busy_seconds": sum(stats.seconds for stats in judged),
        "invalid_share": failures.total() / len(rewards),
        **({f"invalid_{kind}_share": failures[kind] / len(rewards) for kind in FAILURES} if failures else {}),
    }


def _draft_figures(steps_by_tokens: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Of the strategy `verified`: how often the first, second, ... draft is accepted, and the drafts thrown away.

    `steps_by_tokens`: of each report, see `DecodeStats`.
    """
    if not steps_by_tokens:
        return {}
    steps = np.array(steps_by_tokens).sum(axis=0)
    accepted = steps[::-1].cumsum()[::-1][1:] / steps.sum()  # a step that wrote i + 1 tokens accepted i drafts
    shares = {f"draft_{i}_accepted_share": float(share) for i, share in enumerate(accepted, start=1)}
    return shares | ({"drafts_lost_share": 1 - float(accepted.mean())} if len(accepted) else {})
