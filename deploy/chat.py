"""A tokenizer's chat template: which it is, and a prompt in it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import OpdlmError


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
    """
    require_template(tokenizer)
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    extra: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    return tokenizer.apply_chat_template(
        conversation,
        tokenize=False,
        add_generation_prompt=not answer_begun,
        continue_final_message=answer_begun,
        **extra,
    )
