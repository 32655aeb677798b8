"""Credentials in text: recognised by their form, so that no run file, message or report carries them on."""

from __future__ import annotations

import re

_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")  # user:password@, token@
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")  # the hub's access tokens
_QUERY = re.compile(r"(?i)(?<=[?&])(token|access_token|api_key|sig|signature|x-amz-signature)=[^&\s]+")


def redact(text: str) -> str:
    """The same text with `***` where credentials stood."""
    return _TOKEN.sub("***", _QUERY.sub(r"\1=***", _USER_IN_URL.sub("***@", text)))


def holds_secret(text: str) -> bool:
    """Whether a text carries credentials: a user in a URL, a signed query, a token of the hub."""
    return redact(text) != text
