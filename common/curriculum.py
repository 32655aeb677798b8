"""What grows with the rounds (METHOD.md section 6): rollout length and dynamic threshold, as pure functions."""

from __future__ import annotations

import math

from opdlm.common.config.schema import OpdlmConfig, Schedule


def scheduled(schedule: Schedule, round_: int) -> float:
    """Value in a round (from 0). The release: 100 to 4,000 over 100 rounds, `100 + 3900 (1 - cos(pi/2 r/100))`."""
    if schedule.kind == "constant" or schedule.end is None or schedule.rounds is None:
        return schedule.start
    progress = min(round_ / schedule.rounds, 1.0)
    if schedule.kind == "cosine":
        progress = 1.0 - math.cos(math.pi / 2 * progress)
    return schedule.start + (schedule.end - schedule.start) * progress


def length_limit(config: OpdlmConfig, round_: int, domain: str | None = None, own: int | None = None) -> int:
    """Most new tokens of a rollout: the schedule's, cut by the prompt's `own`, its domain's, and the run's limit."""
    limits = [config.rollout.max_new_tokens] + ([own] if own is not None else [])
    if config.curriculum.max_new_tokens is not None:
        limits.append(int(scheduled(config.curriculum.max_new_tokens, round_)))
    if domain is not None and domain in config.curriculum.max_new_tokens_per_domain:
        limits.append(config.curriculum.max_new_tokens_per_domain[domain])
    return min(limits)


def dynamic_threshold(config: OpdlmConfig, round_: int) -> float:
    """Confidence above which `low_confidence_dynamic` reveals."""
    schedule = config.curriculum.threshold
    return config.rollout.threshold if schedule is None else scheduled(schedule, round_)
