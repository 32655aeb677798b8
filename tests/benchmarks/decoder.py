"""Tokens per second of block decoding against transformers' `generate` of the AR teacher, same prompts, one process.

    make demo && make bench        # or: python -m tests.benchmarks.decoder [STUDENT] [TEACHER]

Each repetition times all arms back to back; the ratio of a repetition is taken within it, since machines are noisy.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common.tasks import get_task
from deploy.checkpoint_decoder import Answers, CheckpointDecoder
from deploy.evaluation import Exam

REPETITIONS, PROBLEMS, BATCH, LIMIT = 5, 256, 128, 40


def main(student_folder: str = "runs/demo/student", teacher_folder: str = "models/chain-teacher") -> None:
    """Measures and prints one table."""
    for folder in (student_folder, teacher_folder):
        if not Path(folder).is_dir():
            sys.exit(f"bench: {folder} does not exist; run `make demo` first, or name STUDENT and TEACHER")
    torch.set_num_threads(1)
    student, teacher = CheckpointDecoder(Path(student_folder)), CheckpointDecoder(Path(teacher_folder))
    exam = Exam(get_task("chain"), student.tokenizer, PROBLEMS)
    requests = exam.requests(LIMIT)

    def block(strategy) -> Answers:
        return student.decode(requests, replace(student.base.greedy(strategy), threshold=0.9), BATCH)

    arms = {
        "autoregressive generate (teacher)": lambda: teacher.generate(exam.prompt_ids, LIMIT, BATCH),
        "block decoding, static": lambda: block("low_confidence_static"),
        "block decoding, dynamic 0.9": lambda: block("low_confidence_dynamic"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    per_step: dict[str, float] = {}
    for repetition in range(REPETITIONS + 1):  # the first one warms up
        for name, run in arms.items():
            answers = run()
            per_step[name] = answers.tokens_per_step
            if repetition:
                speeds[name].append(sum(len(r) for r in answers.responses) / answers.seconds)
    table = Table(title=f"{PROBLEMS} problems, batch {BATCH}, one thread, {REPETITIONS} repetitions")
    table.add_column("arm")
    for title in ("tokens per step", "tokens per second", "ratio to generate", "spread of the ratio"):
        table.add_column(title, justify="right")
    base = next(iter(speeds.values()))
    for name, values in speeds.items():
        ratios = [v / b for v, b in zip(values, base, strict=True)]
        table.add_row(
            name,
            f"{per_step[name]:.2f}",
            f"{statistics.median(values):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
