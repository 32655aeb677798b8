"""Time from the end of an optimizer step until every rollout actor has the weights, against the copies that it needs.

    make bench        # or: python -m tests.benchmarks.weight_push [--gigabytes 0.1 1] [--nodes 1 2] [--actors 2]
                      #     [--repetitions 5] [--transport object_store nixl]

A push through Ray's object store must copy all bytes into the store once, out of it once for each actor (all actors at
the same time), and once more between two nodes. The measured push is that of a run: `WeightPacker`, the hand-over to
the replay queue, and `load_weights` with its checksum on each actor. Both nodes are on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from torch import nn

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.types import WeightHandle
from opdlm.common.weights import WeightPacker, load_weights
from opdlm.learner.queue_client import QueueClient
from tests.benchmarks.measure import Ratio, write_json

TENSOR_VALUES = 4 << 20


def weights(nbytes: int, device: str) -> nn.ParameterList:
    """Float32 parameters of 16 MB each."""
    count = max(round(nbytes / 4 / TENSOR_VALUES), 1)
    each = (torch.randn(TENSOR_VALUES, device=device) for _ in range(count))
    return nn.ParameterList(nn.Parameter(values, requires_grad=False) for values in each)


class Learner:
    """Holds weights and publishes them."""

    def __init__(self, queue: Any, nbytes: int, transport: str, device: str) -> None:
        torch.set_num_threads(1)
        self.weights, self.queue, self.version = weights(nbytes, device), QueueClient(queue, 0, 600.0), -1
        self.packer = WeightPacker(on_device=transport == "nixl")
        self.hand_over = self.queue.publish_held if transport == "nixl" else self.queue.publish

    def publish(self) -> dict[str, float]:
        """Packs and hands over a new version; returns the seconds of both."""
        self.version += 1
        self.weights[0].add_(1e-3)
        _wait(self.weights)
        started = time.perf_counter()
        pack = self.packer.pack(self.version, self.weights.named_parameters())
        packed = time.perf_counter()
        self.hand_over(pack)
        return {"pack": packed - started, "hand_over": time.perf_counter() - packed}

    def copy_seconds(self) -> float:
        """Seconds to copy all bytes into newly allocated memory, estimated from one gigabyte to save memory."""
        some, started = list(self.weights)[: int(1e9 / 4 / TENSOR_VALUES)], time.perf_counter()
        # All are kept, or each would reuse the memory of the last. A GPU's weights go to the host.
        fresh = [tensor.detach().to("cpu", copy=True) for tensor in some]
        return (time.perf_counter() - started) * len(self.weights) / len(fresh)


class Rollout:
    """Holds weights and loads new ones."""

    def __init__(self, nbytes: int, device: str) -> None:
        torch.set_num_threads(1)
        self.weights, self.buffer = weights(nbytes, device), weights(min(nbytes, 250_000_000), "cpu")

    def load(self, handle: WeightHandle) -> float:
        """Loads a version as `RolloutActor.load_weights` does; returns the seconds."""
        started = time.perf_counter()
        load_weights(self.weights, ray.get(handle.pack[0]))
        _wait(self.weights)
        return time.perf_counter() - started

    def copy_seconds(self) -> float:
        """Seconds to copy all bytes into the memory of a model."""
        started = time.perf_counter()
        for tensor, source in zip(self.weights, itertools.cycle(self.buffer)):
            tensor.copy_(source)
        _wait(self.weights)
        return time.perf_counter() - started


def _wait(parameters: nn.ParameterList) -> None:
    if not parameters[0].is_cpu:
        torch.cuda.synchronize()


def push(
    gigabytes: float, nodes: int, transport: str, actors: int, repetitions: int, device: str = "cpu"
) -> dict[str, Any]:
    """Measures pushes of one size; a first one, which warms up, is left out."""
    nbytes = int(gigabytes * 1e9)
    store = int(min(3.2 * nbytes + 5e8, 9e9))
    gpus = int(device == "cuda")
    head = {"num_cpus": 8, "num_gpus": gpus, "include_dashboard": False, "object_store_memory": store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    if nodes == 2:
        cluster.add_node(num_cpus=8, resources={"second": 8}, object_store_memory=store)
    try:
        os.environ["RAY_ADDRESS"] = cluster.address
        ray.init(address=cluster.address, log_to_driver=False)
        there: dict[str, Any] = {"resources": {"second": 1}} if nodes == 2 else {}
        there |= {"num_gpus": gpus / (actors + 1)}
        queue = ray.remote(ReplayQueueActor).options(num_cpus=0).remote(1, 0, 1, 0)
        # Two threads: one publishes, while the queue calls the other to fetch the weights.
        here = {"num_cpus": 1, "num_gpus": gpus / (actors + 1), "max_concurrency": 2}
        learner = ray.remote(Learner).options(**here).remote(queue, nbytes, transport, device)
        rollouts = [ray.remote(Rollout).options(num_cpus=1, **there).remote(nbytes, device) for _ in range(actors)]
        found = [_one_push(queue, learner, rollouts, version, nodes) for version in range(repetitions + 1)][1:]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {"gigabytes": gigabytes, "nodes": nodes, "transport": transport, "pushes": found}


def _one_push(queue: Any, learner: Any, rollouts: list[Any], version: int, nodes: int) -> dict[str, float]:
    into_store = ray.get(learner.copy_seconds.remote())
    out_of_store = max(ray.get([actor.copy_seconds.remote() for actor in rollouts]))
    started = time.perf_counter()
    parts = ray.get(learner.publish.remote())
    handle = ray.get(queue.next_weights.remote(version - 1))
    load = max(ray.get([actor.load.remote(handle) for actor in rollouts]))
    bare = into_store * nodes + out_of_store  # on a second node, the bytes go into new memory once more
    return {"seconds": time.perf_counter() - started, "bare_seconds": bare, "load": load, **parts}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--transport", nargs="+", default=["object_store"], choices=["object_store", "nixl"])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the weights; with `cuda` the processes share one GPU")
    chosen = parser.parse_args()
    table = Table(title=f"push of float32 weights to {chosen.actors} rollout actors, {chosen.repetitions} repetitions")
    for name in (
        "transport",
        "nodes",
        "GB",
        "seconds",
        "pack",
        "hand over",
        "load",
        "bare copies",
        "times the bare copies",
    ):
        table.add_column(name, justify="right")
    lines = [
        push(size, nodes, transport, chosen.actors, chosen.repetitions, chosen.device)
        for nodes in chosen.nodes
        for size in chosen.gigabytes
        for transport in chosen.transport
    ]
    for line in lines:
        pushes = line["pushes"]
        ratio = Ratio([p["seconds"] / p["bare_seconds"] for p in pushes])
        means = [sum(p[key] for p in pushes) / len(pushes) for key in ("seconds", "pack", "hand_over", "load")]
        bare = sum(p["bare_seconds"] for p in pushes) / len(pushes)
        what = line["transport"], str(line["nodes"]), f"{line['gigabytes']:g}"
        table.add_row(*what, *(f"{s:.2f}" for s in (*means, bare)), str(ratio))
    console = Console(width=140)
    console.print(table)
    console.print(f"written: {write_json('weight_push', lines)}")


if __name__ == "__main__":
    main()
