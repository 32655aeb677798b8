"""Limits that change from round to round (METHOD.md section 6): the length of responses and the dynamic threshold."""

from __future__ import annotations

import difflib
import math
from collections.abc import Set

from opdlm.common.config.schema import OpdlmConfig, Schedule

_DOMAINS_SHOWN = 10


def scheduled(schedule: Schedule, round_: int) -> float:
    """Returns the value of a schedule in a round, counted from 0.

    The public release has `100 + 3900 (1 - cos(pi/2 r/100))` tokens in round r: `cosine`, 100 to 4,000 in 100 rounds.
    """
    if schedule.kind == "constant" or schedule.end is None or schedule.rounds is None:
        return schedule.start
    progress = min(round_ / schedule.rounds, 1.0)
    if schedule.kind == "cosine":
        progress = 1.0 - math.cos(math.pi / 2 * progress)
    return schedule.start + (schedule.end - schedule.start) * progress


def length_limit(config: OpdlmConfig, round_: int, domain: str | None = None, prompt_limit: int | None = None) -> int:
    """Returns the longest response in tokens that a rollout may have: the smallest limit that applies to it.

    The limits are `rollout.max_new_tokens`, the schedule's value in this round, that of the prompt's domain, and
    `prompt_limit`, the prompt's own.
    """
    limits = [config.rollout.max_new_tokens]
    if prompt_limit is not None:
        limits.append(prompt_limit)
    if config.curriculum.max_new_tokens is not None:
        limits.append(int(scheduled(config.curriculum.max_new_tokens, round_)))
    if domain is not None and domain in config.curriculum.max_new_tokens_per_domain:
        limits.append(config.curriculum.max_new_tokens_per_domain[domain])
    return min(limits)


def longest_limit(config: OpdlmConfig, rounds: int, domain: str | None, prompt_limit: int | None) -> int:
    """Returns the longest response in tokens that a prompt may have in any of the run's rounds; see `length_limit`."""
    # A schedule moves one way, so the longest response is in the first round or in the last.
    return max(length_limit(config, round_, domain, prompt_limit) for round_ in (0, rounds - 1))


def unused_domain_limits(config: OpdlmConfig, domains: Set[str | None]) -> str | None:
    """One line about names in `curriculum.max_new_tokens_per_domain` that no row has; None: every name is used.

    A recipe may name more domains than the data have, so it is no error; a name that is mistyped looks the same.

    Args:
        domains: those of the run's prompts; None stands for rows without one.
    """
    held = sorted(domain for domain in domains if domain is not None)
    unused = sorted(config.curriculum.max_new_tokens_per_domain.keys() - set(held))
    if not unused:
        return None
    shown = ", ".join(held[:_DOMAINS_SHOWN]) + (", ..." if len(held) > _DOMAINS_SHOWN else "")
    found = f"the rows' domains are {shown}" if held else "no row has a domain (data.domain_field)"
    close = [match for name in unused for match in difflib.get_close_matches(name, held, n=1)]
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"curriculum.max_new_tokens_per_domain: no row has the domain {', '.join(unused)}; {found}{hint}"


def dynamic_threshold(config: OpdlmConfig, round_: int) -> float:
    """Returns the confidence above which `low_confidence_dynamic` reveals a position in this round."""
    schedule = config.curriculum.threshold
    return config.rollout.threshold if schedule is None else scheduled(schedule, round_)
