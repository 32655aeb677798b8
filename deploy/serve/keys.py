"""Who may ask: those who bring a key, or, where there is none, this machine, but not any web page that it shows."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

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


def check_origin(keys: Sequence[bytes], origin: str | None, host: str) -> None:
    """A server without keys refuses what pages of other servers ask, which a browser on this machine sends for them.

    Browsers name the page's server in each POST, and whoever asks without one sends no `Origin`. A key, which such a
    page does not have, says enough by itself.

    Args:
        origin: the request's header; None: it has none.
        host: the request's header. A name that is not this machine's own may be a stranger's that resolves to it.

    Raises:
        ApiError: the request is refused.
    """
    if keys or origin is None:
        return
    own = origin.partition("://")[2].lower() == host.lower()
    if not own or not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise ApiError(
            403,
            f"Origin: found {origin} at {host or 'no host'}; a server without keys answers its own page, at this "
            "machine's loopback address, and programs; see --api-key-file",
            "other_origin",
        )
