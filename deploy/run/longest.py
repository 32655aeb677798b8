"""The longest requests of a run, which the cache of a rollout actor must hold (`rollout.cache_tokens`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import longest_limit
from opdlm.common.data.prompts import PromptSet
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import ConfigError
from opdlm.common.grid import decoding_grid
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.evaluate.known_answers import KnownAnswers


@dataclass(frozen=True, slots=True)
class LongRequest:
    """A request, with the most tokens that it may get."""

    name: str
    prompt: int
    """Tokens of the prompt."""
    limit: int
    """Most new tokens."""
    end: int
    """Positions of both, to the end of the last block; with drafts, those of the last step's masks too."""


def longest_rollout(config: OpdlmConfig, prompts: PromptSet, rounds: int) -> LongRequest | None:
    """The longest request of training; None where the student trains on given responses."""
    if config.objective.kind not in ("opd", "rl") or config.run.replay is not None:
        return None
    asked = (
        (prompt.prompt_id, len(prompt.ids), longest_limit(config, rounds, prompt.domain, prompt.max_new_tokens))
        for prompt in prompts.prompts
    )
    return _longest(config, asked)


def longest_question(
    config: OpdlmConfig, tasks: list[str], tokenizer: PreTrainedTokenizerBase, questions: KnownAnswers | None
) -> LongRequest | None:
    """The longest request of the run's evaluations; None where it has none."""
    settings = config.evaluation
    count = max(settings.final_problems, settings.problems if settings.every_rounds else 0)
    if not count or config.run.replay is not None:
        return None
    requests = questions.requests(settings.max_new_tokens) if questions else []
    if tasks:
        problems = HeldOutProblems([get_task(name) for name in tasks], tokenizer, count)
        requests = [*requests, *problems.requests(settings.max_new_tokens)]
    return _longest(config, ((r.prompt_id, r.prompt_ids.size, r.max_new_tokens) for r in requests))


def check_cache(config: OpdlmConfig, rollout: LongRequest | None, question: LongRequest | None) -> None:
    """Refuses a cache that is too small for one request.

    Raises:
        ConfigError: `rollout.cache_tokens` and the longest request are named.
    """
    found = config.rollout.cache_tokens
    longest = max((r for r in (rollout, question) if r is not None), key=lambda request: request.end, default=None)
    if found is not None and longest is not None and longest.end > found:
        raise ConfigError(
            f"rollout.cache_tokens: found {found}, too small for {longest.name}: {longest.prompt} prompt tokens and at "
            f"most {longest.limit} new ones take {longest.end} positions, to the end of their last "
            f"{'step' if config.rollout.strategy == 'verified' else 'block'}; give at least {longest.end}"
        )


def _longest(config: OpdlmConfig, asked: Iterable[tuple[str, int, int]]) -> LongRequest | None:
    rollout = config.rollout
    grid = decoding_grid(rollout.strategy, rollout.block_size, rollout.block_grid)
    ends = ((name, prompt, limit, grid.end_position(prompt, limit)) for name, prompt, limit in asked)
    longest = max(ends, key=lambda request: request[-1], default=None)
    return LongRequest(*longest) if longest is not None else None
