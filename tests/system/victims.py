"""The processes of one Ray cluster on this machine, by role, and how they die."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil

TITLES = {
    "rollout": ("RolloutActor", "rollout-"),
    "teacher": ("TeacherActor", "teacher-"),
    "learner": ("RayTrainWorker",),
    "queue": ("ReplayQueueActor", "replay-queue"),
}
"""By role, what the titles hold that Ray gives to its actors' processes."""


class Victims:
    """Actor processes below some raylets.

    Args:
        raylets: process ids of the raylets of the moment (a cluster's nodes come and go).
    """

    def __init__(self, raylets: Callable[[], list[int]]) -> None:
        self._raylets = raylets

    def all(self) -> Iterator[tuple[str, psutil.Process]]:
        """(role, process) of every actor of ours."""
        for raylet in self._raylets():
            try:
                below = psutil.Process(raylet).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in below:
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:  # ended meanwhile
                    continue
                for role, titles in TITLES.items():
                    if title.startswith("ray::") and any(part in title for part in titles):
                        yield role, process

    def find(self, role: str, patience_seconds: float = 120) -> psutil.Process:
        """One process of a role, waiting until there is one."""
        limit = time.monotonic() + patience_seconds
        while time.monotonic() < limit:
            for found, process in self.all():
                if found == role:
                    return process
            time.sleep(0.1)
        raise AssertionError(f"no process of role {role} in {patience_seconds} s")

    def kill(self, role: str) -> int:
        """SIGKILL to one of a role; its process id."""
        process = self.find(role)
        process.kill()
        return process.pid


def raylets_of(cluster) -> list[int]:
    """Process ids of the raylets of a `ray.cluster_utils.Cluster`."""
    return [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
