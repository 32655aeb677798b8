"""What a reward is given, and the rewards by their names in `reward.kind` (METHOD.md sections 7 and 10).

A reward of one's own is a function of a module, named in `reward.function`:

    from opdlm.common.rewards import Attempt

    def brevity(attempt: Attempt) -> float:
        return -len(attempt.response) / 100 if attempt.has_ended else -1.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from opdlm.common.config.base import AnswerKind
from opdlm.common.config.reward import RewardConfig
from opdlm.common.data.answers import answer_check
from opdlm.common.data.reranking import Reference, RerankCase, read_answer, rerank_reward
from opdlm.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Attempt:
    """One finished response."""

    prompt_id: str
    """Name of the prompt's row: `file:number`, or `task/number`."""
    prompt: str
    """Text of the prompt with its special tokens, as the model reads it."""
    response: str
    """Text of the response without its end-of-sequence token."""
    has_ended: bool
    """Whether the response ended with that token, not at its length limit."""
    reference: Reference | None = None
    """What the data says of the prompt: the text of `data.response_field`, the solution of a task's problem, or its
    re-ranking case. None: nothing."""


Reward = Callable[[Attempt], float]


def make_reward(config: RewardConfig) -> Reward:
    """The reward that a run file asks for.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if config.kind == "rerank":
        return lambda attempt: _rerank(attempt, config.validity_alone)
    if config.kind == "python":
        return import_reward(config.function or "")
    how: AnswerKind = "math" if config.kind == "math" else "exact"
    return lambda attempt: _equals(attempt, how)


def import_reward(name: str) -> Reward:
    """The function `module:function`.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
    except Exception as error:  # the module is the user's: importing it may raise anything
        raise ConfigError(f"reward.function: {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward.function: {name} is {type(function).__name__}; expected a function")
    return function


def _equals(attempt: Attempt, how: AnswerKind) -> float:
    assert isinstance(attempt.reference, str), "`check_references` refuses prompts without an answer"
    return float(attempt.has_ended and answer_check(how, [attempt.reference])(attempt.response) is True)


def _rerank(attempt: Attempt, validity_alone: bool) -> float:
    case = attempt.reference
    assert isinstance(case, RerankCase), "`check_references` refuses prompts without a case"
    return rerank_reward(case, read_answer(case, attempt.response, attempt.has_ended), validity_alone)
