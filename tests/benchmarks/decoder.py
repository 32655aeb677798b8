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
from tests.benchmarks.measure import Ratio, back_to_back

REPETITIONS, PROBLEMS, BATCH, LIMIT = 5, 256, 128, 40


def main(student_folder: str = "runs/demo/student", teacher_folder: str = "models/chain-teacher") -> None:
    """Measures and prints one table."""
    for folder in (student_folder, teacher_folder):
        if not Path(folder).is_dir():
            sys.exit(f"bench: {folder} does not exist; run `make demo` first, or name STUDENT and TEACHER")
    torch.set_num_threads(1)
    student, teacher = CheckpointDecoder(Path(student_folder)), CheckpointDecoder(Path(teacher_folder))
    exam = Exam([get_task("chain")], student.tokenizer, PROBLEMS)
    requests = exam.requests(LIMIT)

    def block(strategy) -> Answers:
        return student.decode(requests, replace(student.base.greedy(strategy), threshold=0.9), BATCH)

    arms = {
        "autoregressive generate (teacher)": lambda: teacher.generate(exam.prompt_ids, LIMIT, BATCH),
        "block decoding, static": lambda: block("low_confidence_static"),
        "block decoding, dynamic 0.9": lambda: block("low_confidence_dynamic"),
    }
    answers: dict[str, list[Answers]] = back_to_back(arms, REPETITIONS)
    speeds = {
        name: [sum(len(r) for r in one.responses) / one.seconds for one in found] for name, found in answers.items()
    }
    table = Table(title=f"{PROBLEMS} problems, batch {BATCH}, one thread, {REPETITIONS} repetitions")
    table.add_column("arm")
    for title in ("tokens per step", "tokens per second", "ratio to generate"):
        table.add_column(title, justify="right")
    base = next(iter(speeds.values()))
    for name, values in speeds.items():
        table.add_row(
            name,
            f"{answers[name][0].tokens_per_step:.2f}",
            f"{statistics.median(values):,.0f}",
            str(Ratio([v / b for v, b in zip(values, base, strict=True)])),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
