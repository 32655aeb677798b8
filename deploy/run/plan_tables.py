"""The tables that `opdlm plan` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from opdlm.deploy.cluster.machines import GIB, Machines
from opdlm.deploy.cluster.memory import RoleMemory, Term
from opdlm.deploy.cluster.node_memory import NodeMemory
from opdlm.deploy.cluster.placement import Demands


def step_table(steps: Mapping[str, str], run_dir: str) -> Table:
    """What the run will do, in words by topic."""
    table = Table(title=f"plan of {run_dir}", show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    for topic, words in steps.items():
        table.add_row(topic, Text(words))  # a token may look like markup
    return table


def resource_table(asked: Demands) -> Table:
    """Processes, CPUs and GPUs of each role, and their sums."""
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


def memory_table(memory: RoleMemory) -> Table:
    """The memory of one process of a role, with its arithmetic."""
    place = "on its GPU" if 0 < memory.gpus <= 1 else f"on each of its {memory.gpus:g} GPUs"
    where = place if memory.gpus else "in its own memory (no GPU)"
    table, unit = _table_of_terms(
        f"memory of one {memory.role} process, {where}", memory.device_bytes + memory.host_bytes, memory.terms
    )
    table.add_row("sum", "" if memory.gpus else "host memory", f"{memory.device_bytes / unit:.2f}")
    if memory.host_bytes:
        table.add_row("", "in host memory", f"{memory.host_bytes / unit:.2f}")
    return table


def node_table(node: NodeMemory, machines: Machines | None) -> Table:
    """Host memory and object store of one node, with their arithmetic."""
    whose = "of all processes, were they on one node"
    if machines is not None and machines.nodes > 1:
        whose = f"of one of {machines.nodes} nodes, at most"
    table, unit = _table_of_terms(f"host memory {whose}", node.nbytes, node.processes)
    for term in node.store:
        _add(table, term, unit)
    table.add_section()
    table.add_row(
        "sum", _there("in Ray's object store", machines, "store_bytes", unit), f"{node.store_bytes / unit:.2f}"
    )
    table.add_row("", _there("in all", machines, "memory_bytes", unit), f"{node.nbytes / unit:.2f}")
    return table


def _there(what: str, machines: Machines | None, field: str, unit: int) -> str:
    if machines is None:
        return what
    return f"{what} ({machines.where} has {getattr(machines, field) / unit:,.2f})"


def _table_of_terms(title: str, total: int, terms: Sequence[Term]) -> tuple[Table, int]:
    """A table with a row for each term and a last line; the unit of its figures, in bytes."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("arithmetic", overflow="fold")
    unit, name = (GIB, "GiB") if total >= GIB else (2**20, "MiB")
    table.add_column(name, justify="right", no_wrap=True)
    for term in terms:
        _add(table, term, unit)
    table.add_section()
    return table, unit


def _add(table: Table, term: Term, unit: int) -> None:
    host = " (host memory)" if term.on_host else ""
    table.add_row(f"{'~ ' if term.estimate else ''}{term.what}", term.arithmetic + host, f"{term.nbytes / unit:.2f}")
