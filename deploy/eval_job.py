"""`opdlm eval`: one table for AR and student checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from common.config.schema import Strategy
from common.errors import OpdlmError
from common.tasks import get_task
from deploy.checkpoint_decoder import Answers, CheckpointDecoder
from deploy.evaluation import Exam


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """As on the command line."""

    problems: int
    strategies: tuple[Strategy, ...]
    threshold: float
    block_size: int | None
    max_new_tokens: int
    batch_size: int


def strategies(names: Sequence[str]) -> tuple[Strategy, ...]:
    """Checks names from the command line."""
    known = get_args(Strategy)
    for name in names:
        if name not in known:
            raise OpdlmError(f"--strategy: found {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def run_eval(folder: Path, task_name: str, options: EvalOptions, console: Console) -> None:
    """Evaluates and prints the table."""
    task = get_task(task_name)
    checkpoint = CheckpointDecoder(folder, options.block_size)
    exam = Exam([task], checkpoint.tokenizer, options.problems)
    table = Table(title=f"{folder}: {options.problems} held-out problems of {task_name}")
    table.add_column("decoding")
    for name in ("exact match", "tokens per denoising step", "tokens per second"):
        table.add_column(name, justify="right")
    with console.status("decoding ...") as status:
        if not checkpoint.is_student:
            answers = checkpoint.generate(exam.prompt_ids, options.max_new_tokens, options.batch_size)
            table.add_row("autoregressive, greedy", *_figures(exam, answers))
        else:
            for strategy in options.strategies:
                status.update(f"decoding: {strategy} ...")
                settings = replace(checkpoint.base.greedy(strategy), threshold=options.threshold)
                answers = checkpoint.decode(exam.requests(options.max_new_tokens), settings, options.batch_size)
                table.add_row(strategy, *_figures(exam, answers))
    console.print(table)


def _figures(exam: Exam, answers: Answers) -> tuple[str, str, str]:
    tokens = sum(len(r) for r in answers.responses)
    return (
        f"{exam.exact_match(answers.responses):.1%}",
        f"{answers.tokens_per_step:.2f}",
        f"{tokens / answers.seconds:,.0f}",
    )
