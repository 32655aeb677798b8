"""Options that commands about answers share; typer shows them as options of each command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from opdlm.common.config.schema import Strategy
from opdlm.common.data.answers import AnswerKind
from opdlm.common.errors import OpdlmError

LoadDtype = Literal["auto", "bfloat16", "float32"]
"""Number format of a model's weights in memory; `auto` is that of the folder."""
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the tokenizer's chat template.")]
Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="With --chat: the template's enable_thinking. Default: its own."),
]
UsualStrategy = Annotated[
    Strategy | None,
    typer.Option(
        help="Remasking strategy. Default: the checkpoint's: low_confidence_dynamic, or sequential_dynamic where its "
        "config.json says so; verified for a lossless student."
    ),
]


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """Where questions with known answers come from: a built-in task, or a file of prompts."""

    task: Annotated[str | None, typer.Option(help="Built-in task, such as chain; several joined by +.")] = None
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="JSONL or parquet file of prompts with accepted answers, or a bundled one: knowledge."
        ),
    ] = None
    prompt_field: Annotated[str, typer.Option(help="Column of the prompt in --data.")] = "prompt"
    answer_field: Annotated[
        str | None,
        typer.Option(help="Column of an accepted answer, or a list of them, in --data. Default: answers, else answer."),
    ] = None
    answer: Annotated[
        AnswerKind | None,
        typer.Option(
            help="Marks rows of --data that have no column `mark`: `exact` text (default), `contains` its words, or "
            "`math`: the last \\boxed{} or number (math-verify)."
        ),
    ] = None
    problems: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of problems; of --data as many of each kind. Default: 1,000 of a task, all of --data."
        ),
    ] = None
    chat: Chat = False
    thinking: Thinking = None


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How many tokens an answer may have, and which processes decode it."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64
    batch_size: Annotated[int, typer.Option(min=1, help="Problems decoded side by side in each process.")] = 128
    actors: Annotated[int, typer.Option(min=0, help="Ray actors that decode; 0 decodes in this process.")] = 0
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs of each of the --actors.")] = 0.0
    dtype: Annotated[
        LoadDtype,
        typer.Option(help="Number format of the weights in memory; auto: as the folder has them."),
    ] = "auto"


_DEFAULTS = QuestionOptions()


def check_questions(asked: QuestionOptions) -> None:
    """Checks that there is one source of questions, and that no option is given that means nothing with it.

    Raises:
        OpdlmError: names the options.
    """
    if (asked.task is None) == (asked.data is None):
        raise OpdlmError(f"found {'neither' if asked.task is None else 'both'} of --task and --data; give one")
    if asked.task is not None:
        refuse_data_options("--task", asked)
    check_thinking(asked)


def refuse_data_options(mode: str, asked: QuestionOptions) -> None:
    """Raises `OpdlmError` for an option about the rows of --data, where `mode` makes the questions."""
    for name, value, default in (
        ("--prompt-field", asked.prompt_field, _DEFAULTS.prompt_field),
        ("--answer-field", asked.answer_field, _DEFAULTS.answer_field),
        ("--answer", asked.answer, _DEFAULTS.answer),
    ):
        if value != default:
            raise OpdlmError(f"{name}: found {value}; it goes with --data, not with {mode}")


def check_thinking(asked: QuestionOptions) -> None:
    """Raises `OpdlmError` for --thinking or --no-thinking without --chat."""
    if asked.thinking is not None and not asked.chat:
        option = "--thinking" if asked.thinking else "--no-thinking"
        raise OpdlmError(f"{option}: found without --chat; only a chat template knows it")


def check_actors(decoding: DecodingOptions) -> None:
    """Raises `OpdlmError` for GPUs of actors where there are no actors."""
    if decoding.gpus_per_actor and not decoding.actors:
        raise OpdlmError(
            f"--gpus-per-actor: found {decoding.gpus_per_actor:g} with --actors 0; without actors this process "
            "decodes, on the GPU if it sees one; give --actors 1 or more"
        )
