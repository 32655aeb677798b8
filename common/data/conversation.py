"""Conversations of data: checks chat messages, and brings their contents into one form, text.

Where a conversation comes from does not matter: JSON, parquet (whose rows have a None for every key that another
message has), a data set or Python. What a template could lose in silence is refused here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from opdlm.common.text import text_fault

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that chat templates and OpenAI's data know. A template may refuse some of them."""
Conversation = tuple[Mapping[str, Any], ...]
"""Chat messages. Each has a `role` and a `content`, which is text, and perhaps keys that only a template reads."""

_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text, as OpenAI's interfaces name them."""
_MEANT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
"""Roles of other formats -> ours, for the error."""


def are_messages(value: Any) -> bool:
    """Whether a value is meant as chat messages: a list of objects."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Checks messages and joins the text parts of each content. Keys whose value is None are left out.

    Raises:
        ValueError: a message has an unknown role, or a content that is no text; its text says which message.
    """
    return tuple(_message(number, message) for number, message in enumerate(messages, start=1))


def blank_message(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Number (from 1) of the first user message without text; None if there is none."""
    return next((n for n, m in enumerate(messages, start=1) if m["role"] == "user" and not m["content"].strip()), None)


def _message(number: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and {"from", "value"} & given.keys():
        raise ValueError(
            f"message {number} has ShareGPT's keys `from` and `value`; expected `role` (`human` is `user`, `gpt` is "
            "`assistant`) and `content`"
        )
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        found = "no role" if role is None else f"role {reprlib.repr(role)}"
        meant = _MEANT.get(str(role).lower(), str(role).lower())
        hint = f"; did you mean `{meant}`?" if role is not None and meant in ROLES else ""
        raise ValueError(f"message {number} has {found}; expected one of {', '.join(ROLES)}{hint}")
    where = f"message {number} ({role})"
    if given.get("content") is None and given.get("tool_calls"):
        raise ValueError(f'{where} has tool calls and no content; expected a content, "" where the calls say it all')
    text = _text_of(where, message.get("content"))
    if fault := text_fault(text):
        raise ValueError(f"{where} holds {fault}")
    return given | {"content": text}


def _text_of(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(_text_of_part(where, part) for part in content)
    found = "no content" if content is None else f"the content {reprlib.repr(content)}"
    raise ValueError(f"{where} has {found}; expected text, or a list of text parts")


def _text_of_part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or (isinstance(kind, str) and kind not in _TEXT_PARTS):
        found = f"of type `{kind}`" if isinstance(kind, str) else reprlib.repr(part)
        raise ValueError(f"{where} has a content part {found}; the models here read text parts only")
    text = part.get("text")
    if kind is None or not isinstance(text, str):
        raise ValueError(f'{where} has the content part {reprlib.repr(part)}; expected {{"type": "text", "text": ...}}')
    return text
