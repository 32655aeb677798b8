"""Prompts through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import ConfigError


class ChatTemplate:
    """`apply_chat_template` with a system message and thinking on or off.

    Args:
        thinking: `enable_thinking` of the template; None leaves it to the template.

    Raises:
        ConfigError: the tokenizer has no template, or one that does not know `enable_thinking`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None, thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._system = system
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.chat_template: the tokenizer has no chat template (chat_template.jinja); add one, "
                " or set data.chat_template to false"
            )
        if thinking is not None and "enable_thinking" not in str(tokenizer.chat_template):
            raise ConfigError(
                f"data.thinking: found {thinking}, but the tokenizer's chat template has no `enable_thinking`; leave "
                "data.thinking empty"
            )
        self._options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}

    def ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers; text is one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        encoded = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **self._options
        )
        return list(encoded["input_ids"])
