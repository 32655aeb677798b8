"""How much memory the machines of a run have: as the run file says, as a cluster's nodes say, or this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.files import read_text

GIB = 2**30
_STORE_SHARE, _STORE_MOST = 0.3, 200 * 10**9
"""Ray's object store where no size is given: this share of the memory, and at most so many bytes."""
_SHARED_SHARE, _SHARED_LEAST = 0.95, 10 * 10**9
"""Ray's store is no larger than this share of /dev/shm, or than so many bytes where that is small."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Machines:
    """Machines that are alike; where a cluster's are not, the least memory and the most GPUs that one of them has."""

    where: str
    """What one of them is, in words for a warning."""
    nodes: int
    gpus: int
    """GPUs of one machine."""
    gpu_bytes: int
    """Memory of one GPU; 0: not known."""
    memory_bytes: int
    """Host memory of one machine, its object store included."""
    store_bytes: int
    """Ray's object store on one machine."""


def planned_machines(resources: ResourcesConfig, gpus: float) -> Machines | None:
    """The machines of a run that has not joined a cluster: those of the run file, or this one.

    Args:
        gpus: what the run asks for.

    Returns: None where the run will join a cluster, or needs one, of which the run file says nothing.
    """
    given = resources.machines
    if given is not None:
        memory = int(given.memory_gib * GIB)
        store = int(given.object_store_gib * GIB) if given.object_store_gib is not None else _store(memory)
        gpu = int(given.gpu_gib * GIB)
        return Machines("a machine of resources.machines", given.nodes, given.gpus, gpu, memory, store)
    here = torch.cuda.device_count()
    if resources.ray_address or os.environ.get("RAY_ADDRESS") or gpus > here:
        return None
    memory = this_memory()
    shared = os.statvfs("/dev/shm") if os.path.exists("/dev/shm") else None
    most = _SHARED_SHARE * shared.f_bsize * shared.f_bavail if shared else 0
    store = min(_store(memory), max(int(most), _SHARED_LEAST))
    return Machines("this machine", 1, here, _gpu_bytes(here), memory, store)


def joined_machines(nodes: Sequence[Mapping[str, Any]], with_gpus: bool) -> Machines:
    """The machines of the Ray that this process has joined or started.

    Args:
        nodes: as `ray.nodes()` gives them; at least one is alive.
        with_gpus: whether the run asks for GPUs; then only nodes that have some count.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    counted = [node for node in alive if node.get("GPU", 0) > 0] if with_gpus else alive
    counted = counted or alive

    def least(*kinds: str) -> int:
        return int(min(sum(node.get(kind, 0.0) for kind in kinds) for node in counted))

    here = _gpu_bytes(torch.cuda.device_count()) if len(alive) == 1 else 0
    gpus = int(max(node.get("GPU", 0) for node in counted))
    memory, store = least("memory", "object_store_memory"), least("object_store_memory")
    return Machines("a node of the cluster", len(counted), gpus, here, memory, store)


def this_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, _CGROUP_LIMITS):
        if file.is_file() and (text := read_text(file).strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def _store(memory: int) -> int:
    return min(int(_STORE_SHARE * memory), _STORE_MOST)


def _gpu_bytes(count: int) -> int:
    """Memory of the smallest GPU of this machine; 0 without one."""
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
