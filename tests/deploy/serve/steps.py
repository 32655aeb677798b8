"""What the events of a stream with denoising steps say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdlm.common.model.tokenizer import load_tokenizer


def choices(parts: list[Any], index: int) -> list[dict[str, Any]]:
    """The events of one response."""
    found = [choice.model_dump() for part in parts for choice in part.choices]
    return [choice for choice in found if choice["index"] == index]


def told(events: list[dict[str, Any]]) -> tuple[list[int], dict[int, str]]:
    """The numbers of the steps, and by position the text of each revealed token."""
    steps = [event["step"] for event in events if "step" in event]
    tokens = [token for step in steps for token in step["tokens"] if token["revealed"]]
    return [step["number"] for step in steps], {token["position"]: token["text"] for token in tokens}


def plain(texts: dict[int, str], folder: Path, count: int) -> str:
    """The text of the first tokens, without special ones."""
    special = load_tokenizer(folder).all_special_tokens
    return "".join(texts[position] for position in range(count) if texts[position] not in special)
