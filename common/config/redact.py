"""Finds credentials in text by their form, so that no run directory, message or report contains them."""

from __future__ import annotations

import re

_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")  # user:password@, token@
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")  # access tokens of the Hugging Face hub
_QUERY = re.compile(r"(?i)(?<=[?&])(token|access_token|api_key|sig|signature|x-amz-signature)=[^&\s]+")


def redact_credentials(text: str) -> str:
    """Returns the text with `***` in place of each credential."""
    return _TOKEN.sub("***", _QUERY.sub(r"\1=***", _USER_IN_URL.sub("***@", text)))


def holds_credentials(text: str) -> bool:
    """Whether a text contains credentials: a user name or password in a URL, a signed query, a token of the hub."""
    return redact_credentials(text) != text
