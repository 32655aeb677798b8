"""`opdlm eval`: one table for AR and student checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.files import write_json
from opdlm.deploy.evaluate.decoders import CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.questions import QuestionSource

AUTOREGRESSIVE = "autoregressive, greedy"


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """As on the command line."""

    strategies: tuple[Strategy, ...]
    threshold: float
    block_size: int | None
    max_new_tokens: int
    batch_size: int
    actors: int = 0
    gpus_per_actor: float = 0.0
    output: Path | None = None


def strategies(names: Sequence[str]) -> tuple[Strategy, ...]:
    """Checks names from the command line."""
    known = get_args(Strategy)
    for name in names:
        if name not in known:
            raise OpdlmError(f"--strategy: found {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def refuse_misplaced(mode: str, options: dict[str, object]) -> None:
    """Raises `OpdlmError` for an option that was given but has no meaning with what is evaluated."""
    for name, value in options.items():
        if value is not None:
            raise OpdlmError(f"{name}: found {value}; it does not go with {mode}")


def open_decoder(folder: Path, options: EvalOptions) -> AbstractContextManager[Decoder]:
    """The checkpoint in this process, or over Ray actors."""
    if options.actors == 0:
        return contextlib.nullcontext(CheckpointDecoder(folder, options.block_size))
    from opdlm.deploy.evaluate.actor_decoder import ActorDecoder

    return ActorDecoder(folder, options.actors, options.gpus_per_actor, block_size=options.block_size)


def run_eval(folder: Path, source: QuestionSource, options: EvalOptions, console: Console) -> None:
    """Evaluates and prints the table; writes its rows to `options.output`, where given."""
    check_output(options.output)
    with open_decoder(folder, options) as decoder:
        questions = source.open(decoder)
        requests = questions.requests(options.max_new_tokens)
        decoder.check_room(requests)
        table = Table(title=f"{folder}: {questions.title}")
        table.add_column("decoding")
        columns = [questions.figure, "tokens per denoising step", "tokens per second"]
        for name in columns + (["no answer found"] if source.answer == "math" else []):
            table.add_column(name, justify="right")
        rows: list[dict[str, Any]] = []
        with console.status("decoding ...") as status:
            for strategy in options.strategies if decoder.is_student else options.strategies[:1]:
                name = strategy if decoder.is_student else AUTOREGRESSIVE
                status.update(f"decoding: {name} ...")
                settings = replace(decoder.base.greedy(strategy), threshold=options.threshold)
                answers = decoder.answer(requests, settings, options.batch_size)
                marks = questions.mark(answers.responses)
                rows.append(
                    {
                        "decoding": name,
                        "right": marks.right,
                        "unanswered": marks.unanswered,
                        "tokens_per_step": answers.tokens_per_step,
                        "tokens_per_second": answers.tokens / answers.seconds,
                    }
                )
                figures = [f"{marks.right:.1%}", f"{answers.tokens_per_step:.2f}"]
                figures += [f"{answers.tokens / answers.seconds:,.0f}"]
                table.add_row(name, *figures, *([str(marks.unanswered)] if source.answer == "math" else []))
    console.print(table)
    if options.output:
        write_results(options.output, {"checkpoint": str(folder), "questions": questions.title, "rows": rows}, console)


def check_output(file: Path | None) -> None:
    """Raises `OpdlmError` where a result could not be written, before anything is decoded."""
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        found = "is a folder" if file.is_dir() else f"lies in {file.parent}, which does not exist"
        raise OpdlmError(f"--output: {file} {found}; give a new file in an existing folder")


def write_results(file: Path, content: Any, console: Console, default: Callable[[Any], Any] | None = None) -> None:
    """Writes results as JSON and says where. `default`: as in `json.dumps`."""
    write_json(file, content, ensure_ascii=False, default=default)
    console.print(f"written: {file}", highlight=False, soft_wrap=True)
