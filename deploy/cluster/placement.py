"""Placement: what each process asks of a node, whether the cluster has it, and the placement groups that reserve it.

opdlm train ─► check_room: totals, then single nodes ─► reserve: a placement group for each role that asks for one
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import PlacementConfig
from opdlm.common.errors import ConfigError, OpdlmError

Demands = dict[str, list[tuple[str, int, float]]]
"""What the roles ask for, by resource: `{"CPU": [(role, processes, each), ...], "GPU": ..., "decode": ...}`."""

log = logging.getLogger("opdlm.placement")

_ACCELERATOR = "accelerator_type:"
_TOLERANCE = 1e-6
_QUIET_SECONDS = 10.0
"""A longer wait for a placement group is logged."""


@dataclass(frozen=True, slots=True)
class RoleDemand:
    """What the processes of one role ask for."""

    role: str
    count: int
    """Number of processes."""
    each: Mapping[str, float]
    """Resources of one process, by Ray's names."""
    group: str = "none"
    """`placement.group`."""


def role_demands(config: OpdlmConfig) -> list[RoleDemand]:
    """What each role of a run asks for. A replay has only a learner; `rl` has rewards."""
    rollout, teacher, learner, spare = config.rollout, config.teacher, config.learner, config.evaluation.actors
    student = rollout.placement.resources(rollout.cpus_per_actor, rollout.gpus_per_actor)
    score = teacher.placement.resources(teacher.cpus_per_actor, teacher.gpus_per_actor)
    train = learner.placement.resources(learner.cpus_per_worker, learner.gpus_per_worker)
    learners = RoleDemand("learner", learner.workers, train, learner.placement.group)
    if config.run.replay is not None:
        return [learners]
    teachers = RoleDemand("teacher", teacher.actors, score, teacher.placement.group)
    judges = RoleDemand("reward", config.reward.actors, {"CPU": config.reward.cpus_per_actor})
    return [
        RoleDemand("rollout", rollout.actors, student, rollout.placement.group),
        *([teachers] if config.starts_teachers else []),
        *([judges] if config.objective.kind == "rl" else []),
        RoleDemand("reference", config.reference_actors, student, rollout.placement.group),
        learners,
        RoleDemand("evaluation", spare, student),
    ]


def demands(config: OpdlmConfig) -> Demands:
    """What the roles of a run ask for, by resource: CPU, GPU, and the nodes' own resources that a role asks for."""
    asked = role_demands(config)
    own = {kind: None for demand in asked if demand.count for kind in demand.each if not kind.startswith(_ACCELERATOR)}
    return {
        kind: [(demand.role, demand.count, demand.each.get(kind, 0.0)) for demand in asked]
        for kind in ("CPU", "GPU", *(kind for kind in own if kind not in ("CPU", "GPU")))
    }


def check_room(config: OpdlmConfig, where: str) -> None:
    """Raises `ConfigError` if the joined cluster lacks what a run asks for. `where`: the beginning of the message."""
    check_demands(demands(config), where)
    check_nodes(role_demands(config), [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_demands(demanded: Demands, where: str) -> None:
    """Raises `ConfigError`, with the arithmetic, if the roles ask for more than the whole cluster has."""
    available = ray.cluster_resources()
    for kind, rows in demanded.items():
        asked = sum(count * each for _, count, each in rows)
        there = available.get(kind, 0.0)
        if asked > there + _TOLERANCE:
            raise ConfigError(
                f"{where}: the run asks for {asked:g} {plural(kind)} ({terms(rows)}), the cluster has {there:g}; "
                "lower the actor counts, add nodes, or give a local Ray more (resources.local_cpus)"
            )


def check_nodes(asked: Sequence[RoleDemand], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises `ConfigError` if a process, or a strict group of processes, would not fit even if all nodes were free.

    Args:
        nodes: resources of each node, by Ray's names.
    """
    for demand in asked:
        if demand.count == 0:
            continue
        fitting = sum(_fits(demand.each, node) for node in nodes)
        if fitting == 0:
            raise ConfigError(
                f"{demand.role}: one process asks for {_in_words(demand.each)}; no node of the {len(nodes)} has all of "
                f"it ({_most_on_one_node(demand.each, nodes)})"
            )
        whole = {kind: demand.count * amount for kind, amount in demand.each.items()}
        if demand.group == "strict_pack" and not any(_fits(whole, node) for node in nodes):
            raise ConfigError(
                f"{demand.role}.placement.group: found `strict_pack` for {demand.count} processes, {_in_words(whole)} "
                f"in all; no node has that ({_most_on_one_node(whole, nodes)}); use `pack`, or fewer"
            )
        if demand.group == "strict_spread" and fitting < demand.count:
            raise ConfigError(
                f"{demand.role}.placement.group: found `strict_spread` for {demand.count} processes; only {fitting} of "
                f"{len(nodes)} nodes have {_in_words(demand.each)}; use `spread`, or fewer"
            )


def reserve(config: OpdlmConfig) -> dict[str, Places]:
    """Reserves the places of the actors, by role; Ray Train places the learner's ranks.

    Raises:
        OpdlmError: a placement group found no room in time. The groups before it are given back.
    """
    placements = {
        "rollout": config.rollout.placement,
        "teacher": config.teacher.placement,
        "evaluation": config.rollout.placement,
        "reference": config.rollout.placement,
    }
    places: dict[str, Places] = {}
    try:
        for demand in role_demands(config):
            if demand.role in placements:
                timeout = config.resources.call_timeout_seconds
                places[demand.role] = Places(demand, placements[demand.role], timeout)
    except BaseException:
        for made in places.values():
            made.free()
        raise
    return places


class Places:
    """The places of one role's actors: its placement group, if it has one, and the node resources that it asks for.

    Args:
        timeout_seconds: longest wait for the group; other jobs on the cluster may have to end first.

    Raises:
        OpdlmError: the group found no room in time.
    """

    def __init__(self, demand: RoleDemand, placement: PlacementConfig, timeout_seconds: float) -> None:
        self._resources = placement.resources(0, 0)  # without the CPUs and GPUs, which are options of their own
        self._reserved = demand.count if demand.group != "none" else 0
        self._group: PlacementGroup | None = None
        if self._reserved:
            bundles = [dict(demand.each)] * demand.count
            self._group = placement_group(
                bundles, strategy=demand.group.upper(), name=f"opdlm-{demand.role}-{uuid4().hex[:8]}"
            )
            what = f"{demand.count} x ({_in_words(demand.each)}) as `{demand.group}`"
            if self._group.wait(min(_QUIET_SECONDS, timeout_seconds)):
                return
            log.warning("%s: waits up to %g s for room for %s", demand.role, timeout_seconds, what)
            if not self._group.wait(timeout_seconds):
                self.free()
                raise OpdlmError(
                    f"{demand.role}.placement.group: no room for {what} in {timeout_seconds:g} s "
                    f"(resources.call_timeout_seconds); what is free in all is {_in_words(ray.available_resources())}"
                )

    def options(self, running: int) -> dict[str, Any]:
        """Ray's options that place one more actor while `running` actors run.

        The actor goes into the placement group while that has a free bundle. It has one if fewer actors run than it
        has bundles, because `opdlm scale` removes the youngest actors first. Further actors go where Ray finds room.
        """
        options: dict[str, Any] = {"resources": self._resources} if self._resources else {}
        if running < self._reserved:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        return options

    def free(self) -> None:
        """Gives the placement group back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group, self._reserved = None, 0


def placement_lines(config: OpdlmConfig) -> list[str]:
    """One line for each role that asks for more than CPUs and GPUs."""
    lines = []
    for demand in role_demands(config):
        own = {kind: amount for kind, amount in demand.each.items() if kind not in ("CPU", "GPU")}
        wishes = [f"nodes with {_in_words(own)} for each process"] if own else []
        wishes += [f"reserved together, {demand.group}"] if demand.group != "none" else []
        if wishes and demand.count:
            lines.append(f"{demand.role}: {'; '.join(wishes)}")
    return lines


def terms(rows: Sequence[tuple[str, int, float]]) -> str:
    """A sum in words, `rollout 4 x 1 + teacher 1 x 2`; roles that ask for nothing are left out."""
    return " + ".join(f"{role} {count} x {each:g}" for role, count, each in rows if count * each)


def plural(kind: str) -> str:
    """The name of a resource in a sentence: `CPUs`, `GPUs`, `decode`."""
    return f"{kind}s" if kind in ("CPU", "GPU") else f"`{kind}`"


def _fits(asked: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(kind, 0.0) + _TOLERANCE for kind, amount in asked.items())


def _in_words(resources: Mapping[str, float]) -> str:
    """Resources in words, without those that Ray adds by itself (memory, node addresses, placement groups)."""
    parts = []
    for kind, amount in resources.items():
        if kind.startswith(_ACCELERATOR):
            parts.append(f"accelerator type {kind.removeprefix(_ACCELERATOR)}")
        elif kind not in ("memory", "object_store_memory") and not kind.startswith("node:") and "_group_" not in kind:
            parts.append(f"{amount:g} {plural(kind) if amount != 1 else kind}")
    return ", ".join(parts) or "nothing"


def _most_on_one_node(asked: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str:
    """In words, the most that one node has of each resource in `asked`."""
    kinds = [kind for kind in asked if not kind.startswith(_ACCELERATOR)]
    most = [f"{max((node.get(kind, 0.0) for node in nodes), default=0.0):g} {plural(kind)}" for kind in kinds]
    types = {kind.removeprefix(_ACCELERATOR) for node in nodes for kind in node if kind.startswith(_ACCELERATOR)}
    if len(kinds) < len(asked):
        most.append(f"accelerator types: {', '.join(sorted(types)) or 'none'}")
    return "the most that one has: " + ", ".join(most)
