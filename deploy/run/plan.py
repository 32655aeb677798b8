"""The plan of a run: what it will do, which processes get which CPUs and GPUs, and the memory of each role.

`opdlm plan` and `opdlm train --dry-run` print it. It starts nothing and loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import length_limit, longest_limit
from opdlm.common.files import write_json
from opdlm.common.grid import decoding_grid
from opdlm.common.model.config import read_config
from opdlm.common.model.end_tokens import token_names
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.cluster.learner_memory import adapter_parameters, learner_memory
from opdlm.deploy.cluster.machines import Machines, joined_machines, planned_machines
from opdlm.deploy.cluster.memory import (
    Lengths,
    ModelSize,
    RoleMemory,
    model_size,
    reference_memory,
    reward_memory,
    rollout_memory,
    teacher_memory,
    to_plain,
)
from opdlm.deploy.cluster.node_memory import NodeMemory, misfits, node_memory, shares
from opdlm.deploy.cluster.placement import Demands, demands, placement_lines, plural
from opdlm.deploy.evaluate.commands import check_output
from opdlm.deploy.observe.outlook import time_lines
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.session import show_data, show_notes
from opdlm.deploy.run.directory import check_run, find_checkpoint, holds_run
from opdlm.deploy.run.paths import absolute_paths, local_models
from opdlm.deploy.run.plan_tables import memory_table, node_table, resource_table, step_table
from opdlm.deploy.run.preflight import Preflight, preflight

_WIDTH = 100
"""Columns that every table uses at most; it fits into 80."""
_TOKENS_SHOWN = 20
"""Tokens of the first prompt that the plan shows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a run before it starts."""

    checked: Preflight
    demands: Demands
    """CPUs, GPUs and other resources that the roles ask Ray for."""
    memory: list[RoleMemory]
    node: NodeMemory
    """What a node needs at most."""
    machines: Machines | None
    """None: they are not known."""

    @property
    def warnings(self) -> list[str]:
        """What does not fit on the machines, a line each."""
        return misfits(self.memory, self.demands, self.node, self.machines) if self.machines else []

    def _teacher(self) -> str:
        config = self.checked.config
        if config.starts_teachers:
            return f"{config.model.teacher} (vocabulary {self.checked.teacher.vocab_size:,})"
        return "none: the student's clean path is it" if config.rollouts_bring_targets else "none: the reward judges"

    def steps(self) -> dict[str, str]:
        """What the run will do, in words by topic."""
        config, schedule, prompts = self.checked.config, self.checked.schedule, self.checked.prompts
        rollout, last = config.rollout, self.checked.schedule.rounds - 1
        first_limit, last_limit = length_limit(config, 0), length_limit(config, last)
        return {
            "teacher": self._teacher(),
            "student starts from": config.model.student or "the teacher, converted",
            "end tokens": token_names(self.checked.student.eos_ids, self.checked.tokenizer),
            "prompts": f"{len(prompts.prompts):,} kept, {len(prompts.refused)} refused",
            **self._sources(),
            "first prompt": self._first_prompt(),
            "samples": f"{schedule.total:,} in {schedule.rounds:,} rounds of {rollout.samples_per_round}",
            "optimizer steps": (
                f"{schedule.steps_before(schedule.rounds):,} of {config.learner.batch_size} trajectories"
            ),
            "rollout length": f"{first_limit} tokens in round 0, {last_limit} in round {last}",
            "trains on": config.run.replay or "rollouts of its own",
            "decoding": f"block {rollout.block_size}, {rollout.block_grid} grid, {rollout.strategy}",
            "student's form": str(self.checked.form),
            "staleness": f"at most {config.queue.max_staleness} rounds",
            **time_lines(config, schedule.rounds, read_records(Path(config.run.dir))),
        }

    def _sources(self) -> dict[str, str]:
        prompts = self.checked.prompts
        return {
            f"source {share.name}": (
                f"{share.kept:,} prompts, weight {share.weight:g}: {share.samples_per_epoch:,} samples an epoch "
                f"({share.samples_per_epoch / prompts.samples_per_epoch:.1%})"
            )
            for share in prompts.shares
        }

    def _first_prompt(self) -> str:
        tokenizer, ids = self.checked.tokenizer, self.checked.prompts.prompts[0].ids.tolist()
        shown = " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(ids[:_TOKENS_SHOWN]))
        more = " ..." if len(ids) > _TOKENS_SHOWN else ""
        return f"{len(ids)} tokens: {shown}{more}"

    def plain(self) -> dict[str, Any]:
        """The plan as data for JSON; memory in bytes."""
        asked = {
            kind: {
                "total": sum(count * each for _, count, each in rows),
                "roles": [{"role": role, "count": count, "each": each} for role, count, each in rows],
            }
            for kind, rows in self.demands.items()
        }
        return {
            "run": self.steps(),
            "resources": asked,
            "memory": [to_plain(m) for m in self.memory],
            "node": asdict(self.node) | {"store_bytes": self.node.store_bytes, "bytes": self.node.nbytes},
            "warnings": self.warnings,
        }


def make_plan(config: OpdlmConfig) -> Plan:
    """Makes the plan of a run.

    Raises:
        OpdlmError: what `opdlm train` would refuse, too: models, data, settings.
    """
    return plan_of(preflight(config), planned_machines(config.resources, _gpus(config)))


def warnings_of_joined(checked: Preflight, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What does not fit on the nodes of the Ray that the run has joined or started. `nodes`: as `ray.nodes()`."""
    return plan_of(checked, joined_machines(nodes, with_gpus=_gpus(checked.config) > 0)).warnings


def _gpus(config: OpdlmConfig) -> float:
    return sum(count * each for _, count, each in demands(config)["GPU"])


def plan_of(checked: Preflight, machines: Machines | None) -> Plan:
    """The plan of a run that passed its checks, on these machines."""
    config, lengths = checked.config, longest_sequences(checked)
    teacher = model_size(config.model.teacher)
    start = config.model.student or config.model.teacher
    student = model_size(start)
    if config.model.student is None and checked.student.mask_id is None:
        tied = read_config(start).tie_word_embeddings
        # Conversion gives the mask token the id after the tokenizer's last; without a spare row it adds one.
        student = student.with_rows(max(len(load_tokenizer(start)) + 1 - student.vocabulary, 0), tied)
    lora = config.model.lora
    adapters = adapter_parameters(start, lora) if lora else None
    if lora is not None and lora.tokens == "noisy":
        student = replace(student, adapters=adapters)
    memory = [learner_memory(config, student, teacher, adapters, lengths)]
    if config.run.replay is None:
        memory = [rollout_memory(config, student, lengths), *_judges(config, student, teacher, lengths), *memory]
    asked = demands(config)
    rounds = checked.schedule.rounds
    node = node_memory(config, memory, asked, student, teacher, lengths, rounds, machines)
    return Plan(checked, asked, memory, node, machines)


def _judges(config: OpdlmConfig, student: ModelSize, teacher: ModelSize, lengths: Lengths) -> list[RoleMemory]:
    """The memory of the roles that say what responses are worth."""
    teachers = [teacher_memory(config, teacher, lengths)] if config.starts_teachers else []
    reference = [reference_memory(config, student, lengths)] if config.reference_actors else []
    return [*teachers, *([reward_memory()] if config.objective.kind == "rl" else []), *reference]


def longest_sequences(checked: Preflight) -> Lengths:
    """The longest prompt, sequence and training row over all prompts, each with its longest response."""
    config = checked.config
    size, drafts = config.rollout.block_size, config.rollout.strategy == "verified"
    grid = decoding_grid(config.rollout.strategy, size, config.rollout.block_grid)
    ends, rows = [0], [0]
    for prompt in checked.prompts.prompts:
        length = len(prompt.ids)
        limit = longest_limit(config, checked.schedule.rounds, prompt.domain, prompt.max_new_tokens)
        end = grid.end_position(length, limit)
        ends.append(end)
        # If every draft is wrong, each token of a response has a draft of its own behind it.
        rows.append(length + limit * (1 + size) if drafts else 2 * end - grid.first_block_start(length))
    question = checked.longest_question.end if checked.longest_question else 0
    longest = max(len(p.ids) for p in checked.prompts.prompts)
    return Lengths(longest, max(ends), max(rows), question, size if drafts else 0)


def show_plan(config: OpdlmConfig, console: Console, json_file: Path | None = None, resume: bool | None = None) -> None:
    """Prints the plan, and writes it to `json_file`.

    Args:
        resume: checks also that the run can start (False) or go on (True) in its directory.

    Raises:
        OpdlmError: see `make_plan`, `check_run`, `find_checkpoint`; or `json_file` cannot be written.
    """
    check_output(json_file, "--json")
    config = local_models(config)
    if resume is not None:
        check_run(absolute_paths(config), resume)
    plan = make_plan(config)
    if resume is not None:
        find_checkpoint(absolute_paths(config), resume, plan.checked.order.digest)
    width = min(console.width, _WIDTH)
    console.print(step_table(plan.steps(), config.run.dir), width=width)
    show_notes(plan.checked.notes, console)
    show_data(config, plan.checked.prompts, console)
    console.print(resource_table(plan.demands), width=width)
    for line in [*placement_lines(config), *cluster_lines(plan.demands, config.resources.ray_address)]:
        console.print(line, width=width, highlight=False)
    for memory in plan.memory:
        console.print(memory_table(memory), width=width)
    for line, _ in shares(plan.memory, plan.demands):
        console.print(line, width=width, highlight=False)
    console.print(node_table(plan.node, plan.machines), width=width)
    console.print("~ an estimate or an upper bound; the CUDA context is not counted", width=width, highlight=False)
    for line in plan.warnings:
        console.print(f"may not fit: {line}", style="yellow", width=width, highlight=False)
    if json_file is not None:
        write_json(json_file, plan.plain())
        console.print(f"written: {json_file}", highlight=False, soft_wrap=True)
    state = "holds a run (needs --resume)" if holds_run(Path(config.run.dir)) else "is free"
    console.print(f"nothing was started; the run directory {state}", highlight=False)


def cluster_lines(asked: Demands, address: str | None) -> list[str]:
    """What the plan cannot know: whether there is a cluster with the GPUs, and the nodes' own resources, of the run.

    Args:
        address: `resources.ray_address`; without it, that of RAY_ADDRESS counts.
    """
    sums = {kind: sum(count * each for _, count, each in rows) for kind, rows in asked.items() if kind != "CPU"}
    wanted = ", ".join(f"{total:g} {plural(kind) if total != 1 else kind}" for kind, total in sums.items() if total)
    if not wanted:
        return []
    if cluster := address or os.environ.get("RAY_ADDRESS"):
        return [f"not checked: whether the cluster at {cluster} has {wanted}; the run checks it when it joins"]
    here = torch.cuda.device_count()
    if {kind for kind, total in sums.items() if total} == {"GPU"} and sums["GPU"] <= here:
        return [f"the run needs {wanted}; this machine has {here}"]
    gpus = f"{here or 'no'} {'GPU' if here == 1 else 'GPUs'}"
    return [
        f"not checked: the run needs {wanted}, this machine has {gpus}, "
        "and the plan does not know your cluster; name it by resources.ray_address or RAY_ADDRESS, or the run ends at "
        "its start"
    ]
