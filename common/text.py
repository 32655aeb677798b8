"""Tells text from strings that are none: what JSON, a terminal or Python can hold, but no tokenizer and no file."""

from __future__ import annotations


def text_fault(text: str) -> str | None:
    """What makes a string no text, with its place (characters count from 1). None: it is text.

    A lone surrogate, as the JSON `"\\ud800"` gives it, has no UTF-8 form, so no tokenizer takes it. Bytes of the
    command line that are no UTF-8 become lone surrogates, too. A NUL ends a text in much of what reads it later.
    """
    if "\0" in text:
        return f"a NUL character (character {text.index(chr(0)) + 1})"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a lone surrogate, \\u{ord(text[error.start]):04x} (character {error.start + 1}), which is no character"
    return None
