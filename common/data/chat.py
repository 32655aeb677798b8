"""Puts prompts through a tokenizer's chat template: training data, `opdlm eval --data --chat` and lm-eval use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from opdlm.common.errors import ConfigError, OpdlmError


class ChatTemplate:
    """Turns the prompts of a run into token ids, with the chat template and the settings of the run's `data` section.

    Args:
        system: system message put in front of every conversation (`data.system_prompt`); None adds no message.
        thinking: value of the template's `enable_thinking` (`data.thinking`); None uses the template's default.

    Raises:
        ConfigError: the tokenizer has no chat template, or `thinking` is set and the template has no
            `enable_thinking`.
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
        """Token ids of a conversation, up to where the assistant's answer starts.

        Args:
            prompt: chat messages (`role`, `content`), or text, which counts as one user message.

        Raises:
            OpdlmError: the template tries to leave transformers' Jinja sandbox.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        text = chat_prompt(self._tokenizer, [*self._system, *messages], self._thinking)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def require_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """Returns the tokenizer's chat template.

    Args:
        name: which template, where the tokenizer has several.

    Raises:
        OpdlmError: the tokenizer has no template, or several and none of this name.
    """
    try:
        return tokenizer.get_chat_template(name)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise OpdlmError(f"chat template: {reason}; use a tokenizer with a chat template, or no template") from None


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | list[dict[str, str]],
    thinking: bool | None = None,
    answer_begun: bool = False,
) -> str:
    """Returns a conversation as text in the template's form, up to where the assistant's answer starts.

    Args:
        messages: chat messages (`role`, `content`), or text, which counts as one user message.
        thinking: value of the template's `enable_thinking`; None uses the template's default.
        answer_begun: the last message is the start of the assistant's answer, which the model continues.

    Raises:
        OpdlmError: the tokenizer has no template, or the template tries to leave transformers' Jinja sandbox.
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
        raise OpdlmError(
            f"chat template: it tries to leave its sandbox ({error}); use a template that only formats messages"
        ) from None
