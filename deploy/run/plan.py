"""`opdlm plan`: who gets what, memory per GPU, and which role a run will wait for. Starts nothing, loads no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import length_limit
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.config import read_config
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.cluster.memory import (
    Lengths,
    RoleMemory,
    adapter_parameters,
    learner_memory,
    model_size,
    rollout_memory,
    teacher_memory,
    to_plain,
)
from opdlm.deploy.cluster.placement import Demands, demands, placement_lines
from opdlm.deploy.run.balance import Balance, Rates, balance_to_plain, balances, read_rates
from opdlm.deploy.run.preflight import Preflight, preflight

GIB = 2**30
_WIDTH = 100
"""Columns that every table fits into."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `opdlm plan` knows about a run."""

    demands: Demands
    memory: list[RoleMemory]
    rates: Rates | None
    balances: list[Balance]

    def plain(self) -> dict[str, Any]:
        """The same figures for JSON; memory in bytes."""
        asked = {
            kind: {
                "total": sum(count * each for _, count, each in rows),
                "roles": [{"role": role, "count": count, "each": each} for role, count, each in rows],
            }
            for kind, rows in self.demands.items()
        }
        measured = balance_to_plain(self.rates, self.balances) if self.rates else None
        return {"resources": asked, "memory": [to_plain(m) for m in self.memory], "balance": measured}


def make_plan(config: OpdlmConfig, rates_of: Path | None) -> Plan:
    """Works the plan out.

    Raises:
        OpdlmError: what `opdlm train` would refuse too (models, data, settings), or an unusable `rates_of`.
    """
    rates = read_rates(rates_of) if rates_of else None
    checked = preflight(config)
    lengths = longest(config, checked)
    teacher = model_size(config.model.teacher)
    start = config.model.student or config.model.teacher
    student = model_size(start)
    if config.model.student is None and checked.student.mask_id is None:
        tied = read_config(start).tie_word_embeddings
        # Conversion gives the mask token the id behind the tokenizer's last; without a spare row it adds one.
        student = student.with_rows(max(len(load_tokenizer(start)) + 1 - student.vocabulary, 0), tied)
    adapters = adapter_parameters(start, config.model.lora) if config.model.lora else None
    memory = [learner_memory(config, student, teacher, adapters, lengths)]
    if config.run.replay is None:
        memory = [rollout_memory(config, student, lengths), teacher_memory(config, teacher, lengths), *memory]
    return Plan(demands(config), memory, rates, balances(config, rates) if rates else [])


def longest(config: OpdlmConfig, checked: Preflight) -> Lengths:
    """The longest prompt, the longest end, the longest training row, over all prompts at their longest response."""
    grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    ends, rows = [0], [0]
    for prompt in checked.prompts.prompts:
        size = len(prompt.ids)
        # A schedule moves one way, so the longest response is in the first round or in the last.
        limit = max(length_limit(config, r, prompt.domain, prompt.max_new_tokens) for r in (0, checked.plan.rounds - 1))
        end = grid.last_position(size, limit)
        ends.append(end)
        rows.append(2 * end - grid.first_block_start(size))
    return Lengths(max(len(p.ids) for p in checked.prompts.prompts), max(ends), max(rows))


def show_plan(config: OpdlmConfig, rates_of: Path | None, json_file: Path | None, console: Console) -> None:
    """Prints the plan, and writes it to `json_file`."""
    plan = make_plan(config, rates_of)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise OpdlmError(f"--json: the folder {json_file.parent} does not exist; make it, or give another file")
    width = min(console.width, _WIDTH)
    console.print(_resources(plan.demands), width=width)
    for line in placement_lines(config):
        console.print(line, width=width, highlight=False)
    for memory in plan.memory:
        console.print(_memory(memory), width=width)
    for line in sharing(plan):
        console.print(line, width=width, highlight=False)
    console.print("~ an estimate or an upper bound; the CUDA context is not counted", width=width, highlight=False)
    if plan.rates is None:
        text = "balance: needs measured rates; give a run that trained some rounds: --rates RUN_DIR"
        console.print(text, width=width, highlight=False)
    else:
        console.print(_balance(config, plan.rates, plan.balances), width=width)
        for line in advice(config, plan.rates, plan.balances):
            console.print(line, width=width, highlight=False)
    if json_file is not None:
        aside = json_file.with_name(f".{json_file.name}.part")
        aside.write_text(json.dumps(plan.plain(), indent=2) + "\n")
        aside.replace(json_file)
        console.print(f"written: {json_file}", highlight=False, soft_wrap=True)


def sharing(plan: Plan) -> list[str]:
    """What several processes on one GPU need together."""
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


def advice(config: OpdlmConfig, rates: Rates, rows: Sequence[Balance]) -> list[str]:
    """What the table says, in words."""
    now = rows[0]
    staleness = config.queue.max_staleness
    overlap = f"overlap: a round is as long as the longest of them, or their sum / {staleness + 1} where that is more"
    how = "take turns: a round is their sum" if staleness == 0 else overlap
    lines = [f"bottleneck: {now.bottleneck}; at max_staleness {staleness} the roles {how}"]
    changed = [row for row in rows if row.slots < rates.slots]
    if changed:
        lines.append(
            f"the rates are of {rates.slots} slots an actor; with {changed[0].rollout_actors} actors a round has only "
            f"{changed[0].slots} prompts for each, so it will decode slower than shown"
        )
    return lines


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
    table.add_column("arithmetic")
    unit, name = (GIB, "GiB") if memory.device_bytes + memory.host_bytes >= GIB else (2**20, "MiB")
    table.add_column(name, justify="right", no_wrap=True)
    for term in memory.terms:
        what = f"{'~ ' if term.estimate else ''}{term.what}"
        host = " (host memory)" if term.on_host else ""
        table.add_row(what, term.arithmetic + host, f"{term.nbytes / unit:.2f}")
    table.add_section()
    table.add_row("sum", "" if memory.gpus else "host memory", f"{memory.device_bytes / unit:.2f}")
    if memory.host_bytes:
        table.add_row("", "offloaded to host memory", f"{memory.host_bytes / unit:.2f}")
    return table


def _balance(config: OpdlmConfig, rates: Rates, rows: Sequence[Balance]) -> Table:
    title = f"seconds a round of {config.rollout.prompts_per_round} prompts, from the rates of {rates.rounds} rounds"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("rollout actors", "rollout", "push", "teacher", "learner", "round", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("longest")
    for row in rows:
        seconds = (
            row.rollout_seconds,
            row.push_seconds,
            row.teacher_seconds,
            row.learner_seconds,
            row.round_seconds,
        )
        figures = [f"{value:.3g}" for value in seconds]
        table.add_row(str(row.rollout_actors), *figures, f"{row.tokens_per_second:,.0f}", row.bottleneck)
    return table


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
