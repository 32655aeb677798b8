"""`opdlm eval`: one table for AR and student checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.files import check_file, write_json
from opdlm.deploy.evaluate.asking import (
    EvalOptions,
    Evaluation,
    check_in_process,
    eval_tables,
    open_teacher,
    sample_lines,
)
from opdlm.deploy.evaluate.decoders import CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_actors, check_questions
from opdlm.deploy.evaluate.questions import Questions, open_questions
from opdlm.deploy.evaluate.reranked import (
    Comparison,
    cases_digest,
    ranked_rows,
    read_beside,
    rerank_comparisons,
    rerank_tables,
)
from opdlm.deploy.observe.meter import Meter

Model = tuple[str, Path]
"""Name in tables and plots, folder."""


def known_strategies(names: Sequence[str]) -> tuple[Strategy, ...]:
    """Names from the command line as strategies, in the schema's order; raises `OpdlmError` for an unknown one."""
    known = get_args(Strategy)
    for name in names:
        if name not in known:
            raise OpdlmError(f"--strategy: found {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def read_models(given: Sequence[str]) -> list[Model]:
    """Reads each `NAME=FOLDER`, or a folder alone, which is its own name.

    Raises:
        OpdlmError: a name or a folder is empty, or a name comes twice.
    """
    models: list[Model] = []
    for text in given:
        name, mark, folder = text.partition("=")
        if not mark:
            folder = name
        if not (name.strip() and folder.strip()):
            raise OpdlmError(f"found {text!r}; expected FOLDER or NAME=FOLDER, such as teacher=models/rerank-teacher")
        if name in [other for other, _ in models]:
            raise OpdlmError(f"found the name {name!r} twice; give each model a name of its own")
        models.append((name, Path(folder)))
    return models


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
        return contextlib.nullcontext(CheckpointDecoder(folder, block_size, dtype=decoding.dtype))
    from opdlm.deploy.evaluate.actor_decoder import ActorDecoder

    return ActorDecoder(folder, decoding.actors, decoding.gpus_per_actor, block_size=block_size, dtype=decoding.dtype)


@contextlib.contextmanager
def open_evaluation(
    folder: Path, asked: QuestionOptions, options: EvalOptions, decoding: DecodingOptions
) -> Iterator[Evaluation]:
    """Checks the options, and opens the checkpoint, its questions and the teacher.

    Raises:
        OpdlmError: the options contradict each other, or a folder or the questions cannot be used.
    """
    check_questions(asked)
    check_in_process(options, decoding)
    with open_decoder(folder, decoding, options.block_size) as decoder:
        questions = open_questions(asked, decoder)
        teacher = None if options.teacher is None else open_teacher(options.teacher, decoder, decoding)
        yield Evaluation(decoder, questions, options, decoding, teacher)


def run_eval(
    folder: Path, asked: QuestionOptions, options: EvalOptions, decoding: DecodingOptions, console: Console
) -> None:
    """Evaluates and prints the tables; writes their rows to `options.output`, where given."""
    check_output(options.output)
    with open_evaluation(folder, asked, options, decoding) as evaluation:
        questions = evaluation.questions
        others = _read_beside(options.beside, questions)
        tell_unknown(questions, console)
        with Meter(console) as meter:
            rows = evaluation.rows(meter)
    title = f"{folder}: {questions.title}"
    tables = eval_tables(title, questions, rows, options.threshold)
    compared: list[Comparison] = []
    if questions.cases:
        ranked = [*others, *ranked_rows(rows, options.threshold)]
        compared = rerank_comparisons(questions.cases, ranked)
        tables += rerank_tables(questions.cases, ranked, compared)
    for table in tables:
        console.print(table, "")
    texts = evaluation.samples(options.samples)
    for lines in sample_lines(texts, options.threshold):
        console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
    for row in rows:
        if row["empty"]:
            line = f"{row['decoding']}: {row['empty']} of {row['responses']} responses are empty: they hold no text"
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    if options.output:
        content = {"checkpoint": str(folder), "questions": questions.title, "threshold": options.threshold}
        content |= {"rows": rows}
        content |= {"cases": cases_digest(questions.cases), "compared": compared} if compared else {}
        content |= {"teacher": str(options.teacher)} if options.teacher else {}
        content |= {"samples": texts} if texts else {}
        write_results(options.output, content, console)


def _read_beside(file: Path | None, questions: Questions) -> list[tuple[str, dict[str, Any]]]:
    if file is None:
        return []
    if not questions.cases:
        raise OpdlmError(f"--beside: found {file}; only re-ranking cases are compared with another evaluation")
    return read_beside(file, questions.cases)


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
