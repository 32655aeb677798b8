"""`opdlm eval`: one table for AR and student checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.files import check_file, write_json
from opdlm.deploy.evaluate.decoders import CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_actors, check_questions
from opdlm.deploy.evaluate.questions import Questions, open_questions
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.tables import decoding_name, new_table

AUTOREGRESSIVE = "autoregressive, greedy"


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The ways of decoding that `opdlm eval` compares, and where its results go."""

    strategies: tuple[Strategy, ...]
    threshold: float
    block_size: int | None
    """None: what the checkpoint says, else 4."""
    output: Path | None = None


def known_strategies(names: Sequence[str]) -> tuple[Strategy, ...]:
    """Names from the command line as strategies, in the schema's order; raises `OpdlmError` for an unknown one."""
    known = get_args(Strategy)
    for name in names:
        if name not in known:
            raise OpdlmError(f"--strategy: found {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def refuse_misplaced(mode: str, options: Mapping[str, object]) -> None:
    """Raises `OpdlmError` for an option that was given but means nothing with what is evaluated."""
    for name, value in options.items():
        if value is not None:
            raise OpdlmError(f"{name}: found {value}; it does not go with {mode}")


def open_decoder(
    folder: Path, decoding: DecodingOptions, block_size: int | None = None
) -> AbstractContextManager[Decoder]:
    """The checkpoint in this process, or over Ray actors."""
    check_actors(decoding)
    if decoding.actors == 0:
        return contextlib.nullcontext(CheckpointDecoder(folder, block_size))
    from opdlm.deploy.evaluate.actor_decoder import ActorDecoder

    return ActorDecoder(folder, decoding.actors, decoding.gpus_per_actor, block_size=block_size)


def run_eval(
    folder: Path, asked: QuestionOptions, options: EvalOptions, decoding: DecodingOptions, console: Console
) -> None:
    """Evaluates and prints the table; writes its rows to `options.output`, where given."""
    check_output(options.output)
    check_questions(asked)
    with open_decoder(folder, decoding, options.block_size) as decoder:
        questions = open_questions(asked, decoder)
        tell_unknown(questions, console)
        with Meter(console) as meter:
            decoder.on_progress = meter
            rows = evaluate(decoder, questions, options, decoding, meter.begin)
    columns = [questions.figure, "tokens per denoising step", "tokens per second"]
    columns += ["unanswered"] if asked.answer == "math" else []
    table = new_table(f"{folder}: {questions.title}", "decoding", *columns)
    for row in rows:
        figures = [f"{row['right']:.1%}", f"{row['tokens_per_step']:.2f}", f"{row['tokens_per_second']:,.0f}"]
        unanswered = [str(row["unanswered"])] if asked.answer == "math" else []
        way = decoding_name(row["decoding"], options.threshold)
        table.add_row(way, *figures, *unanswered)
    console.print(table)
    for row in rows:
        if row["empty"]:
            line = f"{row['decoding']}: {row['empty']} of {row['responses']} responses are empty: they hold no text"
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    if options.output:
        write_results(options.output, {"checkpoint": str(folder), "questions": questions.title, "rows": rows}, console)


def evaluate(
    decoder: Decoder,
    questions: Questions,
    options: EvalOptions,
    decoding: DecodingOptions,
    begins: Callable[[str, int], None] = lambda way, questions: None,
) -> list[dict[str, Any]]:
    """Answers the questions with each strategy (an AR checkpoint: once, greedily) and marks the answers.

    `begins` is called with each way of decoding and the number of questions.

    Returns: a row per way of decoding: `decoding`, `right` (share), `unanswered`, `responses`, `empty` (how many of
        them have no text), `tokens_per_step`, `tokens_per_second`.

    Raises:
        OpdlmError: a prompt is empty or too long for the context.
    """
    requests = questions.requests(decoding.max_new_tokens)
    decoder.check_room(requests)
    rows: list[dict[str, Any]] = []
    for strategy in options.strategies if decoder.is_student else options.strategies[:1]:
        way = strategy if decoder.is_student else AUTOREGRESSIVE
        settings = replace(decoder.base.greedy(strategy), threshold=options.threshold)
        begins(decoding_name(way, options.threshold), len(requests))
        answers = decoder.answer(requests, settings, decoding.batch_size)
        marks = questions.mark(answers.responses)
        rows.append(
            {
                "decoding": way,
                "right": marks.right,
                "unanswered": marks.unanswered,
                "responses": len(answers.responses),
                "empty": decoder.count_empty(answers.responses),
                "tokens_per_step": answers.tokens_per_step,
                "tokens_per_second": answers.tokens / answers.seconds,
            }
        )
    return rows


def tell_unknown(questions: Questions, console: Console) -> None:
    """Says which characters of the questions the model cannot read or write."""
    if questions.unknown is not None:
        console.print(questions.unknown, highlight=False, soft_wrap=True, markup=False)


def check_output(file: Path | None, option: str = "--output") -> None:
    """Raises `OpdlmError` where a result could not be written, before anything is decoded."""
    if file is None:
        return
    if os.path.isdir(file) or not os.path.isdir(file.absolute().parent):
        found = "is a folder" if os.path.isdir(file) else f"lies in {file.parent}, which does not exist"
        raise OpdlmError(f"{option}: {file} {found}; give a new file in an existing folder")
    check_file(file, option)


def write_results(file: Path, content: Any, console: Console, default: Callable[[Any], Any] | None = None) -> None:
    """Writes results as JSON and says where. `default`: as in `json.dumps`."""
    write_json(file, content, ensure_ascii=False, default=default)
    console.print(f"written: {file}", highlight=False, soft_wrap=True)
