"""The keys that requests must bring."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from opdlm.common.config.checks import is_loopback
from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_text
from opdlm.deploy.serve.errors import ApiError


def read_keys(file: str | None) -> list[bytes]:
    """The keys of a file, one a line; none without a file.

    Raises:
        OpdlmError: the file cannot be read or holds no key.
    """
    if file is None:
        return []
    keys = [line.strip().encode() for line in read_text(Path(file)).splitlines() if line.strip()]
    if not keys:
        raise OpdlmError(f"--api-key-file {file}: found no key; expected one a line")
    return keys


def check_key(keys: Sequence[bytes], authorization: str, client: str | None) -> None:
    """Refuses a request without a key; a server without keys refuses those that come from another machine.

    Args:
        authorization: the request's header.
        client: address that the request comes from; None: a way without addresses, such as a Unix socket.

    Raises:
        ApiError: the request is refused.
    """
    if not keys:
        if client is not None and not is_loopback(client):
            raise ApiError(
                401, "this server has no keys and answers its own machine only; see --api-key-file", "no_keys"
            )
        return
    given = authorization.removeprefix("Bearer ").encode()
    if not sum(hmac.compare_digest(given, key) for key in keys):  # with all: no time tells which
        raise ApiError(401, "the request has no valid key (Authorization: Bearer KEY)", "invalid_api_key")
