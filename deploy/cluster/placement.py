"""Who runs where: what each role's processes ask of a node, whether the cluster has it, placement groups.

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
"""Who asks for what: `{"CPU": [(role, count, each), ...], "GPU": ..., "decode": ...}`."""

log = logging.getLogger("opdlm.placement")

_ACCELERATOR = "accelerator_type:"
_TOLERANCE = 1e-6
_SOON_SECONDS = 10.0
"""Longest wait for a placement group that is not worth a word."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a role asks for."""

    role: str
    count: int
    """Processes."""
    each: Mapping[str, float]
    """Resources of one, by Ray's names."""
    group: str = "none"
    """`placement.group`."""


def shares(config: OpdlmConfig) -> list[Share]:
    """What the roles of a run ask for; of a replay, the learner's alone."""
    rollout, teacher, learner, spare = config.rollout, config.teacher, config.learner, config.evaluation.actors
    student = rollout.placement.resources(rollout.cpus_per_actor, rollout.gpus_per_actor)
    score = teacher.placement.resources(teacher.cpus_per_actor, teacher.gpus_per_actor)
    train = learner.placement.resources(learner.cpus_per_worker, learner.gpus_per_worker)
    learners = Share("learner", learner.workers, train, learner.placement.group)
    if config.run.replay is not None:
        return [learners]
    return [
        Share("rollout", rollout.actors, student, rollout.placement.group),
        Share("teacher", teacher.actors, score, teacher.placement.group),
        learners,
        Share("evaluation", spare, student),
    ]


def demands(config: OpdlmConfig) -> Demands:
    """The same by resource. CPUs and GPUs are always there, nodes' own resources where a role asks for them."""
    asked = shares(config)
    own = {kind: None for share in asked if share.count for kind in share.each if not kind.startswith(_ACCELERATOR)}
    return {
        kind: [(share.role, share.count, share.each.get(kind, 0.0)) for share in asked]
        for kind in ("CPU", "GPU", *(kind for kind in own if kind not in ("CPU", "GPU")))
    }


def check_room(config: OpdlmConfig, where: str) -> None:
    """Raises `ConfigError` where the cluster that was joined lacks what a run asks for; `where` begins the message."""
    check_demands(demands(config), where)
    check_nodes(shares(config), [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_demands(demanded: Demands, where: str) -> None:
    """Raises `ConfigError` with the arithmetic where the roles ask for more than the cluster has."""
    available = ray.cluster_resources()
    for kind, rows in demanded.items():
        asked = sum(count * each for _, count, each in rows)
        there = available.get(kind, 0.0)
        if asked > there + _TOLERANCE:
            raise ConfigError(
                f"{where}: the run asks for {asked:g} {plural(kind)} ({terms(rows)}), the cluster has {there:g}; "
                "lower the actor counts or add nodes"
            )


def check_nodes(asked: Sequence[Share], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises `ConfigError` where a process, or a strict group of them, fits on no node even if that is free.

    Args:
        nodes: resources of each node, by Ray's names.
    """
    for share in asked:
        if share.count == 0:
            continue
        fitting = sum(_fits(share.each, node) for node in nodes)
        if fitting == 0:
            raise ConfigError(
                f"{share.role}: one process asks for {_words(share.each)}; no node of the {len(nodes)} has all of it "
                f"({_best(share.each, nodes)})"
            )
        whole = {kind: share.count * amount for kind, amount in share.each.items()}
        if share.group == "strict_pack" and not any(_fits(whole, node) for node in nodes):
            raise ConfigError(
                f"{share.role}.placement.group: found `strict_pack` for {share.count} processes, {_words(whole)} in "
                f"all; no node has that ({_best(whole, nodes)}); use `pack`, or fewer"
            )
        if share.group == "strict_spread" and fitting < share.count:
            raise ConfigError(
                f"{share.role}.placement.group: found `strict_spread` for {share.count} processes; only {fitting} of "
                f"{len(nodes)} nodes have {_words(share.each)}; use `spread`, or fewer"
            )


def reserve(config: OpdlmConfig) -> dict[str, Places]:
    """Where the actors go, by role (the learner's ranks are Ray Train's business): all groups, or none and an error.

    Raises:
        OpdlmError: a placement group found no room in time.
    """
    placements = {
        "rollout": config.rollout.placement,
        "teacher": config.teacher.placement,
        "evaluation": config.rollout.placement,
    }
    places: dict[str, Places] = {}
    try:
        for share in shares(config):
            if share.role in placements:
                patience = config.resources.call_timeout_seconds
                places[share.role] = Places(share, placements[share.role], patience)
    except BaseException:
        for made in places.values():
            made.free()
        raise
    return places


class Places:
    """Where the actors of one role go; its placement group, if there is one.

    Args:
        patience_seconds: longest wait for the group; what others run may have to end first.

    Raises:
        OpdlmError: the group found no room in time.
    """

    def __init__(self, share: Share, placement: PlacementConfig, patience_seconds: float) -> None:
        self._resources = placement.resources(0, 0)  # beside the CPUs and GPUs that an actor asks for by itself
        self._reserved = share.count if share.group != "none" else 0
        self._group: PlacementGroup | None = None
        if self._reserved:
            bundles = [dict(share.each)] * share.count
            self._group = placement_group(
                bundles, strategy=share.group.upper(), name=f"opdlm-{share.role}-{uuid4().hex[:8]}"
            )
            what = f"{share.count} x ({_words(share.each)}) as `{share.group}`"
            if self._group.wait(min(_SOON_SECONDS, patience_seconds)):
                return
            log.warning("%s: waits up to %g s for room for %s", share.role, patience_seconds, what)
            if not self._group.wait(patience_seconds):
                self.free()
                raise OpdlmError(
                    f"{share.role}.placement.group: no room for {what} in {patience_seconds:g} s "
                    f"(resources.call_timeout_seconds); what is free in all is {_words(ray.available_resources())}"
                )

    def options(self, running: int) -> dict[str, Any]:
        """Ray's options for one more actor, where so many run.

        In the group while it has room; those that `opdlm scale` adds beyond it go where Ray finds some. As the
        youngest leave first, fewer actors than the group has bundles means that a bundle is free.
        """
        options: dict[str, Any] = {"resources": self._resources} if self._resources else {}
        if running < self._reserved:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        return options

    def free(self) -> None:
        """Gives the group back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group, self._reserved = None, 0


def placement_lines(config: OpdlmConfig) -> list[str]:
    """What roles ask for beside CPUs and GPUs, a line for each that does."""
    lines = []
    for share in shares(config):
        own = {kind: amount for kind, amount in share.each.items() if kind not in ("CPU", "GPU")}
        wishes = [f"nodes with {_words(own)} for each process"] if own else []
        wishes += [f"reserved together, {share.group}"] if share.group != "none" else []
        if wishes and share.count:
            lines.append(f"{share.role}: {'; '.join(wishes)}")
    return lines


def terms(rows: Sequence[tuple[str, int, float]]) -> str:
    """`rollout 4 x 1 + teacher 1 x 2`; those that ask for nothing are left out."""
    return " + ".join(f"{role} {count} x {each:g}" for role, count, each in rows if count * each)


def plural(kind: str) -> str:
    """A resource in a sentence: `CPUs`, `GPUs`, `decode`."""
    return f"{kind}s" if kind in ("CPU", "GPU") else f"`{kind}`"


def _fits(asked: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(kind, 0.0) + _TOLERANCE for kind, amount in asked.items())


def _words(resources: Mapping[str, float]) -> str:
    """What people set, in words: Ray's memory figures and node addresses are left out."""
    parts = []
    for kind, amount in resources.items():
        if kind.startswith(_ACCELERATOR):
            parts.append(f"accelerator type {kind.removeprefix(_ACCELERATOR)}")
        elif kind not in ("memory", "object_store_memory") and not kind.startswith("node:") and "_group_" not in kind:
            parts.append(f"{amount:g} {plural(kind) if amount != 1 else kind}")
    return ", ".join(parts) or "nothing"


def _best(asked: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str:
    """The most that one node has of each kind that is asked for."""
    kinds = [kind for kind in asked if not kind.startswith(_ACCELERATOR)]
    most = [f"{max((node.get(kind, 0.0) for node in nodes), default=0.0):g} {plural(kind)}" for kind in kinds]
    types = {kind.removeprefix(_ACCELERATOR) for node in nodes for kind in node if kind.startswith(_ACCELERATOR)}
    if len(kinds) < len(asked):
        most.append(f"accelerator types: {', '.join(sorted(types)) or 'none'}")
    return "the most that one has: " + ", ".join(most)
