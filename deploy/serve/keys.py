"""The keys that requests must bring."""

from __future__ import annotations

from pathlib import Path

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_text


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
