"""`opdlm serve`: starts the application on a cluster or on this machine, and drains it at SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time

import ray
from ray import serve
from ray.exceptions import RayActorError
from rich.console import Console

from opdlm.common.config.checks import is_loopback
from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import OpdlmError, first_line
from opdlm.common.model.facts import read_facts
from opdlm.deploy.cluster.connection import join_or_start
from opdlm.deploy.serve.application import application
from opdlm.deploy.serve.keys import read_keys
from opdlm.deploy.serve.options import ServeOptions, check_model

_NAME = "opdlm"
_POLL_SECONDS = 0.2


def run_server(options: ServeOptions, host: str, port: int, drain_seconds: float, console: Console) -> None:
    """Serves until SIGTERM or Ctrl-C; then it refuses further requests and waits for those that are being made.

    Args:
        drain_seconds: longest wait for them; a second signal ends it.

    Raises:
        OpdlmError: no model in the folder that can be served so, or no run; other machines could use the server without
            a key; the keys cannot be read; the cluster cannot be joined or started; or Ray Serve does not start.
    """
    options = options.resolved()
    check_model(read_facts(options.checkpoint), options)
    if not read_keys(options.api_key_file) and not is_loopback(host):
        raise OpdlmError(
            f"--host: found {host}, which other machines can reach, and no --api-key-file; give one, or use 127.0.0.1"
        )
    stop = threading.Event()
    gpus = [("--gpus-per-replica", options.replicas, options.gpus_per_replica)] if options.gpus_per_replica else []
    cpus = [("--cpus-per-replica", options.replicas, options.cpus_per_replica)]
    join_or_start(ResourcesConfig(), {"CPU": cpus, "GPU": gpus})
    try:
        _start_serve(host, port)
        handle = serve.run(application(options), name=_NAME, route_prefix="/")
        # Only now: Ray replaces the handler of SIGTERM when it starts.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        served = f"the newest student of {options.follow}" if options.follow else options.checkpoint
        line = f"serving {served} at http://{host}:{port}/v1 (Ctrl-C drains and ends)"
        console.print(line, highlight=False, soft_wrap=True)
        while not stop.wait(_POLL_SECONDS):
            pass
        stop.clear()
        _drain(handle, stop, time.monotonic() + drain_seconds, console)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def _start_serve(host: str, port: int) -> None:
    try:
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    except RayActorError as error:  # Serve ended its proxy, which did not answer three times in a row
        raise OpdlmError(
            f"Ray Serve did not start: {first_line(error)}; where the machine is busy, start the cluster's head with "
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60"
        ) from None


def _drain(handle: object, stop: threading.Event, until: float, console: Console) -> None:
    """Waits until no response is made any more, or for the time limit or a second signal."""
    left = handle.drain.remote().result()  # type: ignore[attr-defined]
    console.print(f"draining: {left} responses are still made", highlight=False)
    while left and time.monotonic() < until and not stop.wait(_POLL_SECONDS):
        left = handle.drain.remote().result()  # type: ignore[attr-defined]
    console.print(
        f"ended; {left} responses were cut off" if left else "ended; no response was cut off", highlight=False
    )
