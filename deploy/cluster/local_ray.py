"""A Ray that a command starts for itself on this machine, and that ends with it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from opdlm.common.errors import OpdlmError, first_line
from opdlm.deploy.cluster.openmp import OPENMP_WAITS
from opdlm.deploy.cluster.process_end import ends_process_after

WORKER_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's 15 leaves a worker about 1/30 of a core beside other work
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than Serve's 5 s, three times
    **OPENMP_WAITS,
}
"""Environment variables of the processes of a Ray that we start. The user's own values win."""

_START_SECONDS = 300.0
"""Longest start. Ray's own waits end earlier, with an error."""
_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""


def start_local_ray(**arguments: Any) -> None:
    """Starts Ray on this machine. `arguments`: of `ray.init`.

    Raises:
        OpdlmError: its session folder cannot be made, or Ray does not start.
    """
    folder = session_root()
    slow = f"a local Ray has not started within {_START_SECONDS:g} s; its logs are in {folder}/session_latest/logs"
    with defaults_in_environment(WORKER_ENVIRONMENT), ends_process_after(_START_SECONDS, slow):
        try:
            ray.init(address="local", **arguments)
        except Exception as error:  # Ray raises bare `Exception`s too
            ray.shutdown()
            raise OpdlmError(
                f"a local Ray did not start: {first_line(error)} (its logs are in {folder}/session_latest/logs)"
            ) from None


def session_root() -> Path:
    """The folder of Ray's session folders: `ray` in RAY_TMPDIR, else in TMPDIR, else in /tmp.

    Raises:
        OpdlmError: it cannot be made or written, or paths of sockets in it would be too long.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = Path(os.environ[variable] if variable else "/tmp") / "ray"
    where = f"{variable or 'RAY_TMPDIR'}: "
    advice = "set RAY_TMPDIR to a short folder that can be written, such as /tmp"
    longest = folder.absolute() / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "plasma_store"
    if (length := len(os.fsencode(longest))) > _SOCKET_BYTES:
        raise OpdlmError(
            f"{where}found {folder.parent}; the paths of Ray's sockets in it would have {length} bytes, and a socket's "
            f"path has at most {_SOCKET_BYTES}; {advice}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OpdlmError(f"{where}Ray's folder {folder} cannot be written: {error.strerror}; {advice}") from None
    return folder


@contextmanager
def defaults_in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets those environment variables that are not set, for the processes that start in the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
