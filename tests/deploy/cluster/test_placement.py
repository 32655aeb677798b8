"""Placement: the check of single nodes, and real actors on the nodes that were asked for.

`pytest tests/deploy/cluster/test_placement.py`
"""

from __future__ import annotations

from typing import Any

import pytest
import ray

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.cluster.connection import connect
from opdlm.deploy.cluster.placement import check_nodes, check_room, demands, placement_lines, reserve, role_demands
from opdlm.deploy.cluster.roles import start_roles, start_rollout
from tests.patience import PATIENCE

H100 = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
A100 = {"CPU": 32.0, "GPU": 4.0, "accelerator_type:A100": 1.0, "decode": 4.0}


def config_with(**sections: Any) -> OpdlmConfig:
    return config_from_dict({"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 9}} | sections)


def role(name: str, count: int = 1, **settings: Any) -> OpdlmConfig:
    """A run in which a role has `count` processes of one GPU each."""
    number, each = ("workers", "gpus_per_worker") if name == "learner" else ("actors", "gpus_per_actor")
    return config_with(**{name: {number: count, each: 1} | settings})


def test_roles_ask_for_the_resources_of_nodes() -> None:
    config = role("rollout", 3, placement={"node_resources": {"decode": 2}, "accelerator_type": "A100"})
    assert demands(config)["decode"] == [
        ("rollout", 3, 2),
        ("teacher", 1, 0),
        ("reference", 0, 2),
        ("learner", 1, 0),
        ("evaluation", 0, 2),
    ]
    assert list(demands(config)) == ["CPU", "GPU", "decode"]
    assert placement_lines(config) == ["rollout: nodes with 2 `decode`, accelerator type A100 for each process"]
    check_nodes(role_demands(config), [H100, A100])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            role("rollout", placement={"accelerator_type": "B200"}),
            r"rollout: one process asks for 1 CPU, 1 GPU, accelerator type B200; no node of the 2 has all of it "
            r"\(the most that one has: 64 CPUs, 8 GPUs, accelerator types: A100, H100\)",
        ),
        (
            role("teacher", placement={"accelerator_type": "H100", "node_resources": {"decode": 1}}),
            "teacher: one process asks for 1 CPU, 1 GPU, 1 decode, accelerator type H100; no node",
        ),
        (
            role("teacher", gpus_per_actor=9, device_map="auto"),
            "teacher: one process asks for 1 CPU, 9 GPUs; no node of the 2 has all of it",
        ),
        (
            role("learner", 12, batch_size=12, placement={"group": "strict_pack"}),
            r"learner.placement.group: found `strict_pack` for 12 processes, 12 CPUs, 12 GPUs in all; no node has "
            r"that \(the most that one has: 64 CPUs, 8 GPUs\); use `pack`, or fewer",
        ),
        (
            role("rollout", 3, placement={"group": "strict_spread"}),
            "rollout.placement.group: found `strict_spread` for 3 processes; only 2 of 2 nodes have 1 CPU, 1 GPU",
        ),
    ],
)
def test_a_process_that_fits_on_no_node_is_refused(config, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_nodes(role_demands(config), [H100, A100])


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.placement.group: input should be .*found 'dense'"):
        role("rollout", placement={"group": "dense"})


def node_of(actor: Any) -> str:
    return ray.get(actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()))


@pytest.mark.ray
@pytest.mark.slow
def test_actors_are_on_the_nodes_that_were_asked_for(two_nodes, chain_teacher, tmp_path) -> None:
    """Rollout actors on nodes with `second`, teachers on one node each, and an actor beyond its full group."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    (second,) = (name for name, resources in nodes.items() if "second" in resources)
    convert_checkpoint(chain_teacher, tmp_path / "student", 4, "absolute")
    config = config_with(
        model={"teacher": str(chain_teacher), "student": str(tmp_path / "student"), "dtype": "float32"},
        rollout={"actors": 2, "placement": {"node_resources": {"second": 1}, "group": "strict_pack"}},
        teacher={"actors": 2, "dtype": "float32", "placement": {"group": "strict_spread"}},
        resources={"call_timeout_seconds": PATIENCE},
    )
    connect(config)
    roles = start_roles(config, str(tmp_path / "student"), 8, 0)
    try:
        assert {node_of(actor) for actor in roles.rollouts.actors.values()} == {second}
        assert {node_of(actor) for actor in roles.teachers.actors.values()} == set(nodes)
        more = start_rollout(
            config, "rollout-2", str(tmp_path / "student"), "finish", roles.places["rollout"].options(2)
        )
        assert node_of(more) == second, "the group has no bundle left, but the actor still asks for the node's resource"
        ray.kill(more)
        impatient = config.model_copy(
            update={"resources": config.resources.model_copy(update={"call_timeout_seconds": 5.0})}
        )
        with pytest.raises(
            OpdlmError, match=r"rollout.placement.group: no room for 2 x \(1 CPU, 1 second\) as `strict_p"
        ):
            reserve(impatient)  # 2 of the node's 4 CPUs are reserved, 1 is a teacher's
    finally:
        roles.stop()
    with pytest.raises(
        ConfigError, match=r"resources: the run asks for 6 `second` \(rollout 6 x 1\), the cluster has 4"
    ):
        check_room(config_with(rollout={"actors": 6, "placement": {"node_resources": {"second": 1}}}), "resources")
    for places in reserve(config).values():  # the places are free again
        places.free()
