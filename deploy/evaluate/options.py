"""Options that commands about answers share; typer shows them as options of each command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from opdlm.common.data.answers import AnswerKind

Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the tokenizer's chat template.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="The template's enable_thinking. Default: its own.")
]


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """Where questions with known answers come from: a built-in task, or a file of prompts."""

    task: Annotated[str | None, typer.Option(help="Built-in task, such as chain; several joined by +.")] = None
    data: Annotated[
        Path | None, typer.Option("--data", help="JSONL or parquet file of prompts with reference answers.")
    ] = None
    prompt_field: Annotated[str, typer.Option(help="Column of the prompt in --data.")] = "prompt"
    answer_field: Annotated[str, typer.Option(help="Column of the reference answer in --data.")] = "answer"
    answer: Annotated[
        AnswerKind,
        typer.Option(help="`exact` text, or `math`: the value of the last \\boxed{} or number (math-verify)."),
    ] = "exact"
    problems: Annotated[
        int | None, typer.Option(min=1, help="Number of problems. Default: 1,000 of a task, all rows of --data.")
    ] = None
    chat: Chat = False
    thinking: Thinking = None


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How many tokens an answer may have, and which processes decode it."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64
    batch_size: Annotated[int, typer.Option(min=1, help="Problems decoded side by side in each process.")] = 128
    actors: Annotated[int, typer.Option(min=0, help="Ray actors that decode; 0 decodes in this process.")] = 0
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs of each actor.")] = 0.0
