"""What a node of a run needs at most in host memory and in Ray's object store, and what does not fit on its machines.

Ray places the processes, so the figures are those of a node that got the costliest ones: as many as it has GPUs for,
the learner's first rank, the driver, and the samples of its teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdlm.actors.queue.second_copy import VERSIONS
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES
from opdlm.common.samples import PROMPT_BYTES, TRAJECTORY_BYTES, response_token_bytes
from opdlm.deploy.cluster.machines import GIB, Machines
from opdlm.deploy.cluster.memory import DRIVER_MIB, Lengths, ModelSize, RoleMemory, Term
from opdlm.deploy.cluster.placement import Demands

_CONTEXT_BYTES = 2**29
"""About what CUDA itself takes of a GPU for each process."""
_ADVICE = {
    "rollout": "lower rollout.cache_tokens, rollout.batch_size or rollout.max_new_tokens",
    "teacher": "lower teacher.batch_tokens",
    "learner": "lower learner.micro_batch_tokens, or take more learner.workers with learner.zero.stage 3",
}


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """What a node needs at most."""

    processes: list[Term]
    """In the memory of its processes."""
    store: list[Term]
    """In Ray's object store."""

    @property
    def store_bytes(self) -> int:
        """Bytes in the object store."""
        return sum(term.nbytes for term in self.store)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in all, the object store included."""
        return sum(term.nbytes for term in self.processes) + self.store_bytes


def node_memory(
    config: OpdlmConfig,
    roles: Sequence[RoleMemory],
    asked: Demands,
    student: ModelSize,
    teacher: ModelSize,
    lengths: Lengths,
    rounds: int,
    machines: Machines | None,
) -> NodeMemory:
    """What one node needs at most.

    Args:
        rounds: of the run.
        machines: None: the whole run is on one node.
    """
    nodes = machines.nodes if machines else 1
    return NodeMemory(
        _processes(roles, _counts(asked), nodes, machines.gpus if machines else 0),
        _store(config, student, teacher, lengths, rounds, nodes),
    )


def _counts(asked: Demands) -> dict[str, int]:
    """Processes by role; spare actors for evaluations count as rollout actors."""
    counts = {role: count for role, count, _ in asked["CPU"]}
    counts["rollout"] = counts.get("rollout", 0) + counts.get("evaluation", 0)
    return counts


def _processes(roles: Sequence[RoleMemory], counts: dict[str, int], nodes: int, gpus: float) -> list[Term]:
    terms, free = [], float(gpus)
    for role in sorted(roles, key=lambda role: -role.on_its_node() / (role.gpus or 1)):
        here = counts[role.role]
        if nodes > 1:
            here = min(here, math.floor(free / role.gpus + 1e-9) if role.gpus else -(-here // nodes))
            free -= here * role.gpus
        if here:
            each, name = role.on_its_node(), "process" if here == 1 else "processes"
            terms.append(Term(f"{here} {role.role} {name}", f"{here} x {each / GIB:.2f} GiB", here * each, True))
        if more := role.on_its_node(first_rank=True):
            terms.append(Term("the first rank besides", f"terms of the {role.role} of the first rank only", more))
    what = "the replay queue and Ray itself, on the driver's node"
    return [*terms, Term("the driver", what, DRIVER_MIB * 2**20, True)]


def _store(
    config: OpdlmConfig, student: ModelSize, teacher: ModelSize, lengths: Lengths, rounds: int, nodes: int
) -> list[Term]:
    """Samples are held until a checkpoint covers them (`actors/queue/rules.py`), on the nodes of their makers."""
    prompts, response = config.rollout.samples_per_round, lengths.response
    under_way = config.queue.max_staleness + 1
    kept = min(config.checkpoint.every_rounds + under_way, rounds)
    each = PROMPT_BYTES * lengths.prompt + response * response_token_bytes(config, teacher.width, teacher.vocabulary)
    by_actors = config.run.replay is None and config.objective.kind != "cft"
    makers = config.reward.actors if config.objective.kind == "rl" else config.teacher.actors
    parts = min(makers, nodes) if by_actors else 1
    split = f" / {parts} nodes" if parts > 1 else ""
    what = f"{kept} rounds x {prompts} x {each:,} B{split}, each of {response:,} tokens"
    terms = [Term("samples until a checkpoint", what, -(-kept * prompts * each // parts), estimate=True)]
    if config.run.replay is not None:
        return terms
    if config.objective.kind in ("opd", "rl"):
        each = PROMPT_BYTES * lengths.prompt + TRAJECTORY_BYTES * response
        what = f"{under_way} rounds x {prompts} x {each:,} B"
        terms.append(Term("trajectories to score", what, under_way * prompts * each, estimate=True))
    if config.rollout.weight_transport == "object_store":
        size = DTYPE_BYTES[config.model.dtype]
        copy = "; as much on the node of the second copy" if nodes > 1 else ""
        what = f"{VERSIONS} versions x {student.pushed:,} x {size} B{copy}"
        terms.append(Term("weights in flight", what, VERSIONS * student.pushed * size))
    return terms


def shares(roles: Sequence[RoleMemory], asked: Demands) -> list[tuple[str, int]]:
    """What processes that share one GPU need of it together: (in words, bytes) of each case."""
    counts = {role: count for role, count, _ in asked["GPU"]}
    parts = [role for role in roles if 0 < role.gpus < 1]
    if parts and sum(count * each for _, count, each in asked["GPU"]) <= 1:
        terms = " + ".join(f"{counts[role.role]} x {_gib(role.device_bytes)} {role.role}" for role in parts)
        total = sum(counts[role.role] * role.device_bytes for role in parts)
        return [(f"all share one GPU: {terms} = {_gib(total)} GiB", total)]
    cases = []
    for role in parts:
        fitting = min(counts[role.role], math.floor(1 / role.gpus + 1e-9))
        if fitting > 1:
            total = fitting * role.device_bytes
            cases.append((f"{role.role}: up to {fitting} on one GPU, {_gib(total)} GiB together", total))
    return cases


def misfits(roles: Sequence[RoleMemory], asked: Demands, node: NodeMemory, machines: Machines) -> list[str]:
    """What does not fit on the machines, a line each: what, what it needs, what is there, what would help."""
    lines, where = [], machines.where
    gpus = sum(count * each for _, count, each in asked["GPU"])
    if gpus > machines.nodes * machines.gpus + 1e-6:
        there = f"{machines.nodes} x {machines.gpus}" if machines.nodes > 1 else machines.gpus
        lines.append(f"the run asks for {gpus:g} GPUs; {where} has {there}: lower the numbers of actors and workers")
    if machines.gpu_bytes:
        for role in roles:
            need = role.device_bytes + _CONTEXT_BYTES
            if role.gpus and need > machines.gpu_bytes:
                lines.append(
                    f"{role.role}: a process needs up to {_gib(need)} GiB of a GPU; {where} has "
                    f"{_gib(machines.gpu_bytes)}: {_ADVICE[role.role]}"
                )
        for words, need in shares(roles, asked):
            if need > machines.gpu_bytes:
                lines.append(f"{words}; {where} has {_gib(machines.gpu_bytes)}: give the roles GPUs of their own")
    if node.nbytes > machines.memory_bytes:
        lines.append(
            f"a node needs up to {_gib(node.nbytes)} GiB of host memory; {where} has "
            f"{_gib(machines.memory_bytes)}: put fewer processes on a node, or take larger ones"
        )
    if node.store_bytes > machines.store_bytes:
        lines.append(
            f"a node needs up to {_gib(node.store_bytes)} GiB of Ray's object store; {where} has "
            f"{_gib(machines.store_bytes)}, and Ray writes the rest to disk: lower checkpoint.every_rounds, use "
            "teacher.targets topk, or give Ray a larger one"
        )
    return lines


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
