"""The actor processes of a Ray cluster on this machine, by role, so that a test can kill them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil

from tests.patience import wait_until

TITLES = {
    "rollout": ("RolloutActor", "rollout-"),
    "teacher": ("TeacherActor", "teacher-"),
    "reward": ("RewardActor", "reward-"),
    "learner": ("RayTrainWorker",),
    "queue": ("ReplayQueueActor", "replay-queue"),
}
"""By role: parts of the titles that Ray gives to the processes of its actors."""


class Victims:
    """The processes of the run's actors.

    Args:
        raylets: returns the process ids of the cluster's present raylets (nodes are added and removed). An actor's
            process is a descendant of the raylet of its node.
    """

    def __init__(self, raylets: Callable[[], list[int]]) -> None:
        self._raylets = raylets

    def all(self) -> Iterator[tuple[str, psutil.Process]]:
        """(role, process) of every rollout, teacher and reward actor, learner rank and queue."""
        for raylet in self._raylets():
            try:
                below = psutil.Process(raylet).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in below:
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:  # it has ended meanwhile
                    continue
                for role, titles in TITLES.items():
                    if title.startswith("ray::") and any(part in title for part in titles):
                        yield role, process

    def find(self, role: str) -> psutil.Process:
        """Returns one process of a role; waits until there is one."""
        return wait_until(lambda: next((p for found, p in self.all() if found == role), None), f"a process of {role}")

    def kill(self, role: str) -> int:
        """Sends SIGKILL to one process of a role; returns its process id."""
        process = self.find(role)
        process.kill()
        return process.pid


def raylets_of(cluster) -> list[int]:
    """Process ids of the raylets of a `ray.cluster_utils.Cluster`."""
    return [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
