"""Prompts through a tokenizer's chat template: for training data, for `opdlm eval --data` and for lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from opdlm.common.errors import ConfigError, OpdlmError


class ChatTemplate:
    """The template of a run's data, with a system message and thinking on or off.

    Args:
        thinking: `enable_thinking` of the template; None leaves it to the template.

    Raises:
        ConfigError: the tokenizer has no template, or one that does not know `enable_thinking`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None, thinking: bool | None) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self._system = [] if system is None else [{"role": "system", "content": system}]
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.chat_template: the tokenizer has no chat template (chat_template.jinja); add one, "
                "or set data.chat_template to false"
            )
        if thinking is not None and "enable_thinking" not in str(tokenizer.chat_template):
            raise ConfigError(
                f"data.thinking: found {thinking}, but the tokenizer's chat template has no `enable_thinking`; leave "
                "data.thinking empty"
            )

    def ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers; text is one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        text = chat_prompt(self._tokenizer, [*self._system, *messages], self._thinking)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def require_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """The tokenizer's chat template, the one of that name where it has several.

    Raises:
        OpdlmError: it has none, or several and none of that name.
    """
    try:
        return tokenizer.get_chat_template(name)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise OpdlmError(f"chat template: {reason}; the prompts would have to go without one") from None


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | list[dict[str, str]],
    thinking: bool | None = None,
    answer_begun: bool = False,
) -> str:
    """Messages (or one user message) as the template writes them, up to where the assistant's answer starts.

    Args:
        thinking: the template's `enable_thinking`; None leaves it to the template.
        answer_begun: the last message is the assistant's and goes on.

    Raises:
        OpdlmError: no template, or one that tries to leave transformers' Jinja sandbox.
    """
    require_template(tokenizer)
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    extra: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=not answer_begun,
            continue_final_message=answer_begun,
            **extra,
        )
    except SecurityError as error:
        raise OpdlmError(f"chat template: it tries to leave its sandbox, which is refused: {error}") from None
