"""Servers with tiny students for tests: one that runs, what it answers, its processes, students that never end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from safetensors.torch import load_file, save_file

from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.deploy.serve.options import ServeOptions
from tests.patience import PATIENCE, wait_until
from tests.ports import free_ports
from tests.system.victims import raylets_of
from tests.tiny import save_teacher


def endless_student(folder: Path, seed: int, context: int = 512) -> Path:
    """A student whose greedy responses end by their limit alone.

    The logit of its end token is the mean of those of two other tokens, so it is never the largest.
    """
    teacher = save_teacher(folder / f"teacher{seed}", seed, context=context)
    weights = load_file(teacher / "model.safetensors")
    head, (end,) = weights["lm_head.weight"], read_facts(teacher).eos_ids
    head[end] = head[end + 1 : end + 3].mean(0)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(teacher, folder / f"student{seed}", block_size=4, block_grid="absolute")
    return folder / f"student{seed}"


@contextlib.contextmanager
def serving(address: str, options: ServeOptions) -> Iterator[str]:
    """Runs the application of these options on a cluster; gives its URL."""
    from ray import serve

    from opdlm.deploy.serve.application import application

    (port,) = free_ports(1)
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application(options), name="opdlm", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()  # gives up after 30 s, which a busy machine may need and more
        wait_until(_serve_is_gone, "the end of Serve")


def _serve_is_gone() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return True
    return False


def ask(server: str, prompt: str | list[str], tokens: int, **more: Any) -> httpx.Response:
    """One greedy completion; the model's name is `tiny`."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens} | more
    return httpx.post(f"{server}/v1/completions", json=body, timeout=PATIENCE)


def text(answer: httpx.Response) -> str:
    """The text of an answer."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def model(server: str) -> dict[str, Any]:
    """What the server says about its model."""
    return dict(httpx.get(f"{server}/v1/models/tiny", timeout=PATIENCE).raise_for_status().json())


def asked_of_engines(method: str, *given: Any) -> list[Any]:
    """What all engines return."""
    from ray import serve

    return list(serve.get_deployment_handle("engine", "opdlm").broadcast(method, *given).results())


def running_engines() -> int:
    """Number of engines that answer."""
    try:
        return len(asked_of_engines("unfinished"))
    except (RayActorError, DeploymentUnavailableError):
        return 0


def processes_of(cluster: Any, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment on this cluster."""
    found = []
    for process in (child for pid in raylets_of(cluster) for child in psutil.Process(pid).children()):
        with contextlib.suppress(psutil.Error):  # a worker that has just ended
            if f":opdlm:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill(cluster: Any, deployment: str) -> None:
    """Sends SIGKILL to every process of a deployment, and waits until they are gone."""
    found = processes_of(cluster, deployment)
    assert found, f"no process of {deployment}"
    for process in found:
        process.kill()
    wait_until(lambda: not any(process.is_running() for process in found), f"the end of {deployment}")


def answers(server: str) -> bool:
    """Whether the server is healthy."""
    try:
        return httpx.get(f"{server}/health", timeout=PATIENCE).status_code == 200
    except httpx.HTTPError:
        return False
