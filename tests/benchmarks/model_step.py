"""Where the time of a training step of a real model goes: forward, backward, optimizer, and the kernels.

    python -m tests.benchmarks.model_step runs/smollm2-135m/student models/smollm2-135m [--threads 2]

The rows of random trajectories go through the learner's own module and DeepSpeed engine. The bare forward of as many
tokens is measured beside them, because its speed is the floor: a step without waste takes three of them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.model.facts import read_facts, require_mask, shared_tokens
from opdlm.common.model.load import hidden_states, load_model, load_output_matrix
from opdlm.common.types import HiddenTargets, ScoredTrajectory, Trajectory
from opdlm.learner import zero
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import pack
from opdlm.learner.rows import Row, build_rows
from opdlm.learner.targets import gather_targets
from tests.benchmarks.measure import parser, write_json


def random_rows(
    count: int, prompt: int, response: int, width: int, folder: Path, objective: ObjectiveConfig
) -> list[Row]:
    """The rows of `count` trajectories of random tokens in blocks of 4, with random hidden states as targets."""
    facts, rng = read_facts(folder), np.random.default_rng(0)
    grid, rows = BlockGrid(4, "response"), []
    for index in range(count):
        trajectory = Trajectory(
            index=index,
            prompt_id=str(index),
            prompt_ids=rng.integers(0, facts.tokens.end - 1, prompt).astype(np.int32),
            response_ids=rng.integers(0, facts.tokens.end - 1, response).astype(np.int32),
            reveal_step=np.concatenate([4 * b + 1 + rng.permutation(4) for b in range(response // 4)]).astype(np.int32),
            response_length=response,
            weight_version=0,
            finish_reason="length",
            denoising_steps=response,
        )
        targets = HiddenTargets(rng.standard_normal((response, width), dtype=np.float32))
        rows += build_rows(ScoredTrajectory(trajectory, targets), grid, objective, require_mask(facts), rng, facts.form)
    return rows


def seconds(act: Callable[[], object], repetitions: int) -> float:
    """The shortest time of a few calls, after one that does not count."""
    act()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Measures, prints two tables, writes JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("student", type=Path, help="folder of a student")
    arguments.add_argument("teacher", type=Path, help="folder of its teacher")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--trajectories", type=int, default=16)
    arguments.add_argument("--selection", default="one_state_per_block", help="as objective.selection")
    arguments.add_argument("--prompt", type=int, default=45, help="tokens")
    arguments.add_argument("--response", type=int, default=36, help="tokens, a multiple of 4")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
    student = load_model(chosen.student, chosen.dtype)
    objective = ObjectiveConfig(exclude_eos=False, selection=chosen.selection)
    lengths, width = (chosen.prompt, chosen.response), student.config.hidden_size
    rows = random_rows(chosen.trajectories, *lengths, width, chosen.student, objective)
    facts = read_facts(chosen.student)
    tokens = shared_tokens(read_facts(chosen.teacher), facts)
    batch = pack(rows)
    targets = gather_targets(rows, load_output_matrix(chosen.teacher, chosen.dtype), objective, tokens)
    weights = torch.full((len(batch.loss_row),), 1 / len(batch.loss_row))
    module = DistillModule(student, objective, 1024, form=facts.form)
    engine = zero.initialise(module, LearnerConfig(), chosen.dtype)
    count, width = batch.input_ids.numel(), 64

    def bare() -> None:
        with torch.no_grad():
            hidden_states(student, batch.input_ids[:, : count - count % width].view(-1, width))

    spent = {"bare forward": seconds(bare, chosen.repetitions)}
    parts: dict[str, list[float]] = {"forward and losses": [], "backward": [], "optimizer": []}

    def step() -> None:
        started = time.perf_counter()
        engine.set_gradient_accumulation_boundary(True)
        loss, _ = engine(batch, targets, weights)
        forward_at = time.perf_counter()
        engine.backward(loss)
        backward_at = time.perf_counter()
        engine.step()
        ended = time.perf_counter()
        times = forward_at - started, backward_at - forward_at, ended - backward_at
        for part, took in zip(parts, times, strict=True):
            parts[part].append(took)

    spent["step"] = seconds(step, chosen.repetitions)
    spent |= {part: min(times[1:]) for part, times in parts.items()}
    table = Table(title=f"{chosen.student}: {len(rows)} rows, {count} tokens, {len(weights)} loss positions")
    for name in ("part", "seconds", "tokens per second", "of three bare forwards"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, took in spent.items():
        table.add_row(part, f"{took:.2f}", f"{count / took:,.0f}", f"{took / spent['bare forward'] / 3:.2f}")
    console = Console(width=100)
    console.print(table)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    console.print(profiled.key_averages().table("self_cpu_time_total", row_limit=12, max_name_column_width=40))
    console.print(f"written: {write_json('model_step', {'student': str(chosen.student), 'tokens': count, **spent})}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
