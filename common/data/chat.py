"""Puts prompts through a tokenizer's chat template: training data, `opdlm eval --data --chat` and lm-eval use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from opdlm.common.data.conversation import blank_message
from opdlm.common.errors import ConfigError, OpdlmError, first_line
from opdlm.common.text import text_fault

_NEVER_LEFT_OUT = ("system", "developer", "user")
"""Roles whose contents must be in the text that a template makes. (Templates leave out an answer's thinking.)"""
EMPTY = "the prompt is empty"


class ChatRefused(OpdlmError):
    """A template refuses a conversation, or would lose a part of it. The text does not say which row it is."""


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

    def ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer starts.

        Args:
            prompt: chat messages (`role`, `content`), or text, which counts as one user message.

        Raises:
            OpdlmError: see `chat_prompt`.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
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
    messages: str | Sequence[Mapping[str, Any]],
    thinking: bool | None = None,
    answer_begun: bool = False,
) -> str:
    """Returns a conversation as text in the template's form, up to where the assistant's answer starts.

    Args:
        messages: chat messages (`role`, `content`), or text, which counts as one user message. Contents are text
            (`conversation.py` makes them so).
        thinking: value of the template's `enable_thinking`; None uses the template's default.
        answer_begun: the last message is the start of the assistant's answer, which the model continues.

    Raises:
        OpdlmError: the tokenizer has no template, or the template tries to leave transformers' Jinja sandbox.
        ChatRefused: a user message is empty, the template refuses the messages, or it leaves one of them out.
    """
    require_template(tokenizer)
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    conversation = [dict(message) for message in given]
    if (number := blank_message(conversation)) is not None:
        raise ChatRefused(EMPTY if isinstance(messages, str) else f"message {number} (user) is empty")
    extra: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(
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
    except Exception as error:  # the template's code may raise anything for messages that it does not expect
        raise ChatRefused(f"the template refuses it: {first_line(error)}; correct the messages") from None
    assert isinstance(text, str), "tokenize=False"
    _check_complete(conversation, text)
    if fault := text_fault(text):
        raise ChatRefused(f"the conversation holds {fault}; correct the text")
    return text


def _check_complete(conversation: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises `ChatRefused` where a template passes over a message in silence, such as one of a role it does not know.

    A message with tool calls must leave their names in the text.
    """
    for number, message in enumerate(conversation, start=1):
        calls = message.get("tool_calls") or []
        names = [str(call.get("function", call).get("name", "")) for call in calls if isinstance(call, Mapping)]
        content = [message["content"].strip()] if message["role"] in _NEVER_LEFT_OUT else []
        if any(part not in text for part in (*content, *names)):
            raise ChatRefused(
                f"the template leaves out message {number} (role `{message['role']}`), or a part of it; use roles and "
                "contents that the tokenizer's template knows"
            )
