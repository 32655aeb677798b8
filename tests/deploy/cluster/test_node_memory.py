"""What a node needs, and what does not fit. `pytest tests/deploy/cluster/test_node_memory.py`"""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.deploy.cluster import machines as machines_module
from opdlm.deploy.cluster.machines import GIB, Machines, joined_machines, planned_machines
from opdlm.deploy.cluster.memory import DRIVER_MIB, Lengths, ModelSize, RoleMemory, Term
from opdlm.deploy.cluster.node_memory import misfits, node_memory
from opdlm.deploy.cluster.placement import demands

SIZE = ModelSize(1000, layers=2, width=16, intermediate=32, heads=2, kv_heads=1, head_dim=8, vocabulary=32)
LENGTHS = Lengths(prompt=40, end=100, row=160)
LARGE = Machines("a machine", nodes=2, gpus=4, gpu_bytes=80 * GIB, memory_bytes=900 * GIB, store_bytes=90 * GIB)


def config_with(**sections) -> OpdlmConfig:
    base = {
        "model": {"teacher": "t"},
        "data": {"task": "chain", "prompts": 9},
        "rollout": {"actors": 3, "gpus_per_actor": 1, "prompts_per_round": 8},
        "teacher": {"gpus_per_actor": 1},
        "learner": {"workers": 3, "gpus_per_worker": 1},
        "queue": {"max_staleness": 1},
        "checkpoint": {"every_rounds": 5},
    }
    return config_from_dict(base | sections)


def role(name: str, device: int, host: int, first: int = 0, gpus: float = 1) -> RoleMemory:
    terms = [Term("on the GPU", "", device), Term("libraries", "", host, on_host=True)]
    if first:
        terms.append(Term("packed", "", first, on_host=True, first_rank_only=True))
    return RoleMemory(name, gpus, terms)


ROLES = [role("rollout", 10, 5), role("teacher", 10, 4), role("learner", 10, 7, first=100)]


def test_a_node_gets_the_costliest_processes_that_its_gpus_allow() -> None:
    config = config_with()
    node = node_memory(config, ROLES, demands(config), SIZE, SIZE, LENGTHS, 100, LARGE)
    found = {term.what: term.nbytes for term in node.processes}
    assert found == {
        "3 learner processes": 21,
        "the first rank besides": 100,
        "1 rollout process": 5,
        "the driver": DRIVER_MIB * 2**20,
    }
    alone = node_memory(config, ROLES, demands(config), SIZE, SIZE, LENGTHS, 100, None)
    assert {"3 rollout processes", "1 teacher process"} <= {term.what for term in alone.processes}


def test_the_object_store_by_hand() -> None:
    """Five rounds until a checkpoint and two in progress, of 8 samples; two versions of 1,000 weights of 2 bytes."""
    config = config_with()
    node = node_memory(config, ROLES, demands(config), SIZE, SIZE, LENGTHS, 100, LARGE)
    sample = 40 * 4 + 60 * (12 + 16 * 2)
    assert [term.nbytes for term in node.store] == [7 * 8 * sample, 2 * 8 * (40 * 4 + 60 * 12), 4000]
    assert node.nbytes == sum(term.nbytes for term in [*node.processes, *node.store])
    short = node_memory(config, ROLES, demands(config), SIZE, SIZE, LENGTHS, 3, LARGE)
    assert short.store[0].nbytes == 3 * 8 * sample, "the run has no more rounds"
    spread = config_with(teacher={"gpus_per_actor": 1, "actors": 2})
    assert (
        node_memory(spread, ROLES, demands(spread), SIZE, SIZE, LENGTHS, 100, LARGE).store[0].nbytes
        == 7 * 8 * sample / 2
    )
    direct = config_with(rollout={"gpus_per_actor": 1, "prompts_per_round": 8, "weight_transport": "nixl"})
    assert len(node_memory(direct, ROLES, demands(direct), SIZE, SIZE, LENGTHS, 100, LARGE).store) == 2
    replay = config_with(run={"replay": "rollouts"})
    (samples,) = node_memory(replay, ROLES[2:], demands(replay), SIZE, SIZE, LENGTHS, 100, LARGE).store
    assert samples.nbytes == 7 * 8 * sample


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, None),
        ({"gpus": 3}, "the run asks for 7 GPUs; a machine has 2 x 3: lower the numbers of actors and workers"),
        (
            {"gpu_bytes": 10},
            "rollout: a process needs up to 0.50 GiB of a GPU; a machine has 0.00: lower rollout.cache_",
        ),
        (
            {"memory_bytes": GIB},
            "a node needs up to 3.42 GiB of host memory; a machine has 1.00: put fewer processes on",
        ),
        (
            {"store_bytes": 99},
            "a node needs up to 0.00 GiB of Ray's object store; a machine has 0.00, and Ray writes the",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, line) -> None:
    config, machines = config_with(), replace(LARGE, **changed)
    node = node_memory(config, ROLES, demands(config), SIZE, SIZE, LENGTHS, 100, machines)
    lines = misfits(ROLES, demands(config), node, machines)
    assert lines[0].startswith(line) if line else lines == []


def test_processes_that_share_a_gpu_are_counted_together() -> None:
    config = config_with(rollout={"actors": 2, "gpus_per_actor": 0.5, "prompts_per_round": 8})
    roles = [role("rollout", 50 * GIB, 1, gpus=0.5), role("teacher", 10, 4), role("learner", 10, 7)]
    node = node_memory(config, roles, demands(config), SIZE, SIZE, LENGTHS, 100, LARGE)
    (line,) = misfits(roles, demands(config), node, LARGE)
    assert line.startswith("rollout: up to 2 on one GPU, 100.00 GiB together; a machine has 80.00: give the roles GPUs")


def test_the_machines_of_the_run_file_come_first(monkeypatch) -> None:
    given = {"nodes": 3, "gpus": 8, "gpu_gib": 80, "memory_gib": 1000}
    resources = config_with(resources={"machines": given, "ray_address": "head:6379"}).resources
    found = planned_machines(resources, 24)
    assert found is not None
    assert (found.nodes, found.gpus, found.gpu_bytes, found.memory_bytes) == (3, 8, 80 * GIB, 1000 * GIB)
    assert found.store_bytes == 200 * 10**9, "Ray takes no more by itself"
    own = config_with(resources={"machines": given | {"object_store_gib": 250}}).resources
    assert planned_machines(own, 24).store_bytes == 250 * GIB
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert planned_machines(config_with(resources={"ray_address": "head:6379"}).resources, 0) is None
    monkeypatch.setattr(machines_module.torch.cuda, "device_count", lambda: 0)
    assert planned_machines(config_with().resources, 1) is None, "this machine has no GPU, so another one is meant"
    here = planned_machines(config_with().resources, 0)
    assert here is not None
    assert 0 < here.store_bytes < here.memory_bytes


def test_a_container_has_the_memory_of_its_limit(tmp_path, monkeypatch) -> None:
    (tmp_path / "unlimited").write_text("max\n")
    (tmp_path / "limited").write_text("123456\n")
    monkeypatch.setattr(machines_module, "_CGROUP_LIMITS", (str(tmp_path / "unlimited"), str(tmp_path / "none")))
    assert machines_module.this_memory() > 123456
    monkeypatch.setattr(machines_module, "_CGROUP_LIMITS", (str(tmp_path / "limited"),))
    assert machines_module.this_memory() == 123456


def test_a_cluster_counts_with_the_least_memory_of_a_node_that_the_run_can_use() -> None:
    def node(alive: bool = True, **resources: float) -> dict:
        return {"Alive": alive, "Resources": resources}

    nodes = [
        node(memory=8, object_store_memory=2),
        node(GPU=8, memory=70, object_store_memory=30),
        node(GPU=4, memory=90, object_store_memory=20),
        node(alive=False, GPU=1, memory=1, object_store_memory=1),
    ]
    found = joined_machines(nodes, with_gpus=True)
    assert (found.nodes, found.gpus, found.memory_bytes, found.store_bytes) == (2, 8, 100, 20)
    assert joined_machines(nodes, with_gpus=False).memory_bytes == 10
