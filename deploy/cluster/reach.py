"""Whether a Ray cluster can be joined. Asked before `ray.init`, which waits for a dead cluster without an end.

address ──► host and port ──► does anything listen? ──► does Ray's head answer, with our token, in our version?
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from typing import Any

import ray

from opdlm.common.errors import ConfigError, OpdlmError, first_line

_CONNECT_SECONDS = 10.0
"""Longest wait until the head's port accepts a connection."""
_ANSWER_SECONDS = 20.0
"""Longest wait for the head's answer to one small question."""


def check_reachable(address: str, where: str) -> str:
    """Asks the head of the Ray cluster at `address`; returns its `host:port`.

    Args:
        address: `host:port`, or `auto` for the cluster that runs on this machine.
        where: the setting or variable that has the address, for errors.

    Raises:
        ConfigError: the address has another form.
        OpdlmError: nothing listens there, or no Ray, or a Ray that refuses the token or has other versions.
    """
    if "://" in address:
        kind = "a Ray client's address, which is for Ray Client"
        if address.startswith(("http://", "https://")):
            kind = "a dashboard's address, which is for `ray job submit` (--address or RAY_API_SERVER_ADDRESS)"
        raise ConfigError(f"{where}: found {address}, {kind}; to join a cluster, give the head's host:port")
    if address == "auto":
        address = _cluster_of_this_machine(where)
    found = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^\[\]:/\s]+)):(\d{1,5})", address)
    if not found or not 0 < int(found[3]) < 65536:
        raise ConfigError(f"{where}: found {address!r}; expected the head's host:port, such as 10.0.0.1:6379")
    _check_port(found[1] or found[2], int(found[3]), f"{where}: no cluster answers at {address}")
    _check_versions(_metadata(address, where), address, where)
    return address


def _cluster_of_this_machine(where: str) -> str:
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.utils import read_ray_address

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init(address="auto")` does
    found: str | None = read_ray_address()
    if not found:
        raise OpdlmError(
            f"{where}: found auto, but no cluster runs on this machine; give its host:port, or leave it empty to start "
            "a local Ray"
        )
    return found


def _check_port(host: str, port: int, failure: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = f"no answer in {_CONNECT_SECONDS:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise OpdlmError(f"{failure}: {reason}; is its head running, and is this the head's address?") from None


def _metadata(address: str, where: str) -> dict[str, Any]:
    """The versions that the cluster's head keeps. Asked with Python's gRPC, whose calls end in time."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import RayError

    try:
        channel = create_gcs_channel(address)
        request = gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
        reply = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=_ANSWER_SECONDS)
        channel.close()
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise OpdlmError(_other_token(address, where)) from None
        raise OpdlmError(
            f"{where}: no cluster answers at {address}: something listens there, but not Ray's head "
            f"({error.code().name.lower()}); give the head's host:port"
        ) from None
    except (RayError, OSError, ValueError) as error:  # a token that is missing or cannot be read
        reason = first_line(error).partition(". ")[0]  # Ray goes on with all its ways to give one
        raise OpdlmError(
            f"{where}: {address} cannot be asked: {reason}; put the head's token into ~/.ray/auth_token, or name its "
            "file with RAY_AUTH_TOKEN_PATH"
        ) from None
    return json.loads(reply.value) if reply.value else {}


def _other_token(address: str, where: str) -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return (
            f"{where}: the cluster at {address} has token authentication, and it is off in this process; set "
            "RAY_AUTH_MODE=token (and RAY_AUTH_TOKEN_PATH, where the token is not in ~/.ray/auth_token)"
        )
    return (
        f"{where}: the cluster at {address} refuses this process's token; give the head's token (RAY_AUTH_TOKEN, "
        "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
    )


def _check_versions(metadata: dict[str, Any], address: str, where: str) -> None:
    here = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    there = {name: str(metadata.get(name, version)) for name, version in here.items()}
    if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor":
        here["python_version"], there["python_version"] = (
            ".".join(versions["python_version"].split(".")[:2]) for versions in (here, there)
        )
    if here != there:
        raise OpdlmError(
            f"{where}: the cluster at {address} runs Ray {there['ray_version']} on Python {there['python_version']}, "
            f"this process Ray {here['ray_version']} on Python {here['python_version']}; use the same versions"
        )
