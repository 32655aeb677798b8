"""What a checkpoint is examined on: held-out problems of a built-in task, or a file of prompts with answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import CHECKS, AnswerKind, Check
from opdlm.common.data.chat import chat_prompt
from opdlm.common.data.rows import read_records
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import Decoder
from opdlm.deploy.evaluate.during_run import HeldOutProblems

TASK_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Marks:
    """How many answers were right."""

    right: float
    """Share of right ones."""
    unanswered: int
    """Responses in which no answer was found; they count as wrong."""


class Questions(Protocol):
    """Prompts, and how to mark the answers to them."""

    title: str
    figure: str
    """What `Marks.right` is called."""

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The prompts as decode requests."""
        ...

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Marks responses, `[R] int32` each, in the order of the requests."""
        ...


@dataclass(frozen=True, slots=True)
class QuestionSource:
    """As on the command line: a task, or a file with its fields."""

    task: str | None
    data: Path | None
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    answer: AnswerKind = "exact"
    problems: int | None = None
    """Of a task 1,000 by default, of a file all."""
    chat: bool = False
    """Put each prompt of a file through the tokenizer's chat template, as the user's message."""
    thinking: bool | None = None
    """`enable_thinking` of the template; None leaves it to the template."""

    def open(self, decoder: Decoder) -> Questions:
        """Reads the questions and turns the prompts to ids.

        Raises:
            OpdlmError: not exactly one source, or one that cannot be used; the row is named.
        """
        if (self.task is None) == (self.data is None):
            raise OpdlmError(f"found {'neither' if self.task is None else 'both'} of --task and --data; give one")
        return TaskQuestions(self, decoder) if self.data is None else DataQuestions(self, self.data, decoder)


class TaskQuestions:
    """Held-out problems of a built-in task."""

    figure = "exact match"

    def __init__(self, source: QuestionSource, decoder: Decoder) -> None:
        if source.chat:
            raise OpdlmError("--chat: built-in tasks have no chat form; it goes with --data or --lm-eval")
        self._exam = HeldOutProblems([get_task(str(source.task))], decoder.tokenizer, source.problems or TASK_PROBLEMS)
        self.requests = self._exam.requests
        self.title = f"{len(self._exam.problems)} held-out problems of {source.task}"

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Whole answers, ended."""
        return Marks(self._exam.exact_match(responses), 0)


class DataQuestions:
    """Rows of a data set, each a prompt and a reference answer."""

    def __init__(self, source: QuestionSource, file: Path, decoder: Decoder) -> None:
        rows = read_rows(file, source.prompt_field, source.answer_field, source.problems)
        self.title = f"{len(rows)} rows of {file.name}"
        self.figure = "exact match" if source.answer == "exact" else "right (math)"
        self._decoder = decoder
        self._names = [where for where, _, _ in rows]
        self._checks = [_check(source.answer, where, answer) for where, _, answer in rows]
        self._prompts = [
            decoder.encode(chat_prompt(decoder.tokenizer, prompt, source.thinking) if source.chat else prompt)
            for _, prompt, _ in rows
        ]

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The rows as decode requests."""
        named = zip(self._names, self._prompts, strict=True)
        return [RolloutRequest(i, name, ids, max_new_tokens, seed=i) for i, (name, ids) in enumerate(named)]

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Marks the text of the responses, special tokens left out."""
        texts = [self._decoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        verdicts = [check(text) for check, text in zip(self._checks, texts, strict=True)]
        return Marks(sum(verdict is True for verdict in verdicts) / len(verdicts), verdicts.count(None))


def read_rows(file: Path, prompt_field: str, answer_field: str, most: int | None) -> list[tuple[str, str, str]]:
    """`(file:row, prompt, answer)` of each row of a data set, the first `most` of them.

    Raises:
        OpdlmError: no data, or the first row that is broken or lacks a field, by its number.
    """
    rows: list[tuple[str, str, str]] = []
    try:
        for where, row in itertools.islice(read_records(DataConfig(path=str(file))), most):
            for flag, field, kinds in (
                ("--prompt-field", prompt_field, (str,)),
                ("--answer-field", answer_field, _ANSWER),
            ):
                if field not in row:
                    raise OpdlmError(f"{flag}: {where} has no `{field}`; found: {', '.join(row)}")
                if not isinstance(row[field], kinds) or isinstance(row[field], bool):
                    raise OpdlmError(f"{flag}: {where}: `{field}` is {row[field]!r}; expected text")
            rows.append((where, row[prompt_field], str(row[answer_field])))
    except ConfigError as error:
        raise OpdlmError(str(error).replace("data.path:", "--data:")) from error
    if not rows:
        raise OpdlmError(f"--data: {file} has no rows")
    return rows


_ANSWER = (str, int, float)


def _check(kind: AnswerKind, where: str, answer: str) -> Check:
    try:
        return CHECKS[kind](answer)
    except ValueError as error:
        raise OpdlmError(f"--answer {kind}: {where}: {error}") from None
