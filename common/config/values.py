"""Checks of the values of a config alone, whatever their settings mean: text that is none, and credentials."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opdlm.common.config.redact import holds_credentials, redact_credentials
from opdlm.common.text import text_fault


def no_texts(value: Any, path: str = "") -> Iterator[str]:
    """Finds names and values that are no text: paths, columns and messages that nothing could use."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield from no_texts(key, path)
            yield from no_texts(held, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for place, held in enumerate(value):
            yield from no_texts(held, f"{path}[{place}]" if isinstance(held, dict) else path)
    elif isinstance(value, str) and (fault := text_fault(value)):
        yield f"{path}: {value!r} holds {fault}; correct the text"


def secrets(section: dict[str, Any], path: str = "") -> Iterator[str]:
    """Finds credentials, because the config is written to the run directory and to model cards."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from secrets(value, f"{path}{key}.")
        elif isinstance(value, list):
            for place, held in enumerate(value):
                yield from secrets(held, f"{path}{key}[{place}].") if isinstance(held, dict) else ()
        elif isinstance(value, str) and holds_credentials(value):
            found = f"{path}{key}: found credentials in {redact_credentials(value)!r}"
            yield f"{found}; leave them out and set HF_TOKEN instead"
