"""`opdlm train --dry-run`: every check that needs no cluster, and the plan in a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import length_limit
from opdlm.deploy.cluster.placement import demands, plural, terms
from opdlm.deploy.run.preflight import preflight


def show_plan(config: OpdlmConfig, console: Console) -> None:
    """Prints what the run would do; raises the same errors as the run would."""
    checked = preflight(config)
    plan, rollout, learner = checked.plan, config.rollout, config.learner
    table = Table(title=f"plan of {config.run.dir}", show_header=False)
    last = plan.rounds - 1
    start = config.model.student or "the teacher, converted"
    for name, value in (
        ("teacher", f"{config.model.teacher} (vocabulary {checked.teacher.vocab_size:,})"),
        ("student starts from", start),
        ("prompts", f"{len(checked.prompts.prompts):,} kept, {len(checked.prompts.refused)} refused"),
        ("samples", f"{plan.total:,} in {plan.rounds:,} rounds of {rollout.prompts_per_round}"),
        ("optimizer steps", f"{plan.steps_before(plan.rounds):,} of {learner.batch_size} trajectories"),
        (
            "rollout length",
            f"{length_limit(config, 0)} tokens in round 0, {length_limit(config, last)} in round {last}",
        ),
        ("trains on", config.run.replay or "rollouts of its own"),
        ("decoding", f"block {rollout.block_size}, {rollout.block_grid} grid, {rollout.strategy}"),
        ("staleness", f"at most {config.queue.max_staleness} rounds"),
    ):
        table.add_row(name, value)
    for kind, rows in demands(config).items():
        asked = terms(rows)
        total = sum(count * each for _, count, each in rows)
        table.add_row(f"{plural(kind)} asked for", f"{total:g}" + (f" = {asked}" if asked else ""))
    console.print(table)
    for line in checked.prompts.refused[:10]:
        console.print(f"refused prompt {line}", highlight=False)
    state = "holds a run (needs --resume)" if (Path(config.run.dir) / "checkpoints").exists() else "is free"
    console.print(f"nothing was started; run directory {config.run.dir} {state}", highlight=False)
