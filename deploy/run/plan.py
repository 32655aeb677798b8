"""The plan of a run: what it will do, which processes get which CPUs and GPUs, and the memory of each role.

`opdlm plan` and `opdlm train --dry-run` print it. It starts nothing and loads no weights.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import length_limit, longest_limit
from opdlm.common.files import write_json
from opdlm.common.grid import BlockGrid
from opdlm.common.model.config import read_config
from opdlm.common.model.end_tokens import token_names
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.cluster.learner_memory import adapter_parameters, learner_memory
from opdlm.deploy.cluster.memory import (
    DRIVER_MIB,
    Lengths,
    RoleMemory,
    model_size,
    rollout_memory,
    teacher_memory,
    to_plain,
)
from opdlm.deploy.cluster.placement import Demands, demands, placement_lines, plural
from opdlm.deploy.evaluate.commands import check_output
from opdlm.deploy.observe.outlook import time_lines
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.session import show_data, show_notes
from opdlm.deploy.run.directory import check_run, find_checkpoint, holds_run
from opdlm.deploy.run.paths import absolute_paths, local_models
from opdlm.deploy.run.preflight import Preflight, preflight

GIB = 2**30
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

    def steps(self) -> dict[str, str]:
        """What the run will do, in words by topic."""
        config, schedule, prompts = self.checked.config, self.checked.schedule, self.checked.prompts
        rollout, last = config.rollout, self.checked.schedule.rounds - 1
        first_limit, last_limit = length_limit(config, 0), length_limit(config, last)
        return {
            "teacher": f"{config.model.teacher} (vocabulary {self.checked.teacher.vocab_size:,})",
            "student starts from": config.model.student or "the teacher, converted",
            "end tokens": token_names(self.checked.student.eos_ids, self.checked.tokenizer),
            "prompts": f"{len(prompts.prompts):,} kept, {len(prompts.refused)} refused",
            **self._sources(),
            "first prompt": self._first_prompt(),
            "samples": f"{schedule.total:,} in {schedule.rounds:,} rounds of {rollout.prompts_per_round}",
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
        return {"run": self.steps(), "resources": asked, "memory": [to_plain(m) for m in self.memory]}


def make_plan(config: OpdlmConfig) -> Plan:
    """Makes the plan of a run.

    Raises:
        OpdlmError: what `opdlm train` would refuse, too: models, data, settings.
    """
    checked = preflight(config)
    lengths = longest_sequences(checked)
    teacher = model_size(config.model.teacher)
    start = config.model.student or config.model.teacher
    student = model_size(start)
    if config.model.student is None and checked.student.mask_id is None:
        tied = read_config(start).tie_word_embeddings
        # Conversion gives the mask token the id after the tokenizer's last; without a spare row it adds one.
        student = student.with_rows(max(len(load_tokenizer(start)) + 1 - student.vocabulary, 0), tied)
    adapters = adapter_parameters(start, config.model.lora) if config.model.lora else None
    memory = [learner_memory(config, student, teacher, adapters, lengths)]
    if config.run.replay is None:
        memory = [rollout_memory(config, student, lengths), teacher_memory(config, teacher, lengths), *memory]
    return Plan(checked, demands(config), memory)


def longest_sequences(checked: Preflight) -> Lengths:
    """The longest prompt, sequence and training row over all prompts, each with its longest response."""
    config = checked.config
    grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    ends, rows = [0], [0]
    for prompt in checked.prompts.prompts:
        size = len(prompt.ids)
        limit = longest_limit(config, checked.schedule.rounds, prompt.domain, prompt.max_new_tokens)
        end = grid.end_position(size, limit)
        ends.append(end)
        rows.append(2 * end - grid.first_block_start(size))
    question = checked.longest_question.end if checked.longest_question else 0
    return Lengths(max(len(p.ids) for p in checked.prompts.prompts), max(ends), max(rows), question)


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
    console.print(_steps(plan), width=width)
    show_notes(plan.checked.notes, console)
    show_data(config, plan.checked.prompts, console)
    console.print(_resources(plan.demands), width=width)
    for line in [*placement_lines(config), *cluster_lines(plan.demands, config.resources.ray_address)]:
        console.print(line, width=width, highlight=False)
    for memory in plan.memory:
        console.print(_memory(memory), width=width)
    for line in sharing(plan):
        console.print(line, width=width, highlight=False)
    for line in (host_line(plan), "~ an estimate or an upper bound; the CUDA context is not counted"):
        console.print(line, width=width, highlight=False)
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


def host_line(plan: Plan) -> str:
    """The host memory of all processes of the run, were they on one node."""
    counts = {role: count for role, count, _ in plan.demands["CPU"]}
    counts["rollout"] = counts.get("rollout", 0) + counts.get("evaluation", 0)
    total = DRIVER_MIB * 2**20 + sum(
        counts[memory.role] * (memory.host_bytes if memory.gpus else memory.device_bytes) for memory in plan.memory
    )
    beside = f"{DRIVER_MIB / 1024:.1f} GiB of them the driver, the queue and Ray itself"
    return f"~ host memory of all processes together: {_gib(total)} GiB, {beside}; Ray's object store comes on top"


def sharing(plan: Plan) -> list[str]:
    """The memory that several processes on one GPU need together, a line per case."""
    counts = {role: count for role, count, _ in plan.demands["GPU"]}
    parts = [m for m in plan.memory if 0 < m.gpus < 1]
    asked = sum(count * each for _, count, each in plan.demands["GPU"])
    if parts and asked <= 1:
        terms = " + ".join(f"{counts[m.role]} x {_gib(m.device_bytes)} {m.role}" for m in parts)
        total = sum(counts[m.role] * m.device_bytes for m in parts)
        return [f"all share one GPU: {terms} = {_gib(total)} GiB"]
    lines = []
    for memory in parts:
        fitting = min(counts[memory.role], math.floor(1 / memory.gpus + 1e-9))
        if fitting > 1:
            total = fitting * memory.device_bytes
            lines.append(f"{memory.role}: up to {fitting} on one GPU, {_gib(total)} GiB together")
    if len(parts) > 1:
        lines.append(f"Ray may put {' and '.join(m.role for m in parts)} on one GPU: count them together")
    return lines


def _steps(plan: Plan) -> Table:
    table = Table(title=f"plan of {plan.checked.config.run.dir}", show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    for topic, words in plan.steps().items():
        table.add_row(topic, Text(words))  # a token may look like markup
    return table


def _resources(asked: Demands) -> Table:
    table = Table(title="resources", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("role")
    for name in ("processes", "CPUs each", "GPUs each", "CPUs", "GPUs"):
        table.add_column(name, justify="right")
    gpus = {role: each for role, _, each in asked["GPU"]}
    for role, count, cpus in asked["CPU"]:
        if count:
            figures = (cpus, gpus[role], count * cpus, count * gpus[role])
            table.add_row(role, str(count), *(f"{figure:g}" for figure in figures))
    table.add_section()
    sums = [sum(count * each for _, count, each in asked[kind]) for kind in ("CPU", "GPU")]
    table.add_row("sum", "", "", "", *(f"{each:g}" for each in sums))
    return table


def _memory(memory: RoleMemory) -> Table:
    place = "on its GPU" if 0 < memory.gpus <= 1 else f"on each of its {memory.gpus:g} GPUs"
    where = place if memory.gpus else "in its own memory (no GPU)"
    title = f"memory of one {memory.role} process, {where}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("arithmetic", overflow="fold")
    unit, name = (GIB, "GiB") if memory.device_bytes + memory.host_bytes >= GIB else (2**20, "MiB")
    table.add_column(name, justify="right", no_wrap=True)
    for term in memory.terms:
        what = f"{'~ ' if term.estimate else ''}{term.what}"
        host = " (host memory)" if term.on_host else ""
        table.add_row(what, term.arithmetic + host, f"{term.nbytes / unit:.2f}")
    table.add_section()
    table.add_row("sum", "" if memory.gpus else "host memory", f"{memory.device_bytes / unit:.2f}")
    if memory.host_bytes:
        table.add_row("", "in host memory", f"{memory.host_bytes / unit:.2f}")
    return table


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
