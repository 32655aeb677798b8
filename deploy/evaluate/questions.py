"""Questions with known answers: held-out problems of a built-in task, or a file of prompts and answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import ANSWER_CHECKS, AnswerCheck, AnswerKind
from opdlm.common.data.chat import EMPTY, ChatRefused, chat_prompt
from opdlm.common.data.conversation import Conversation
from opdlm.common.data.rows import Question, read_questions
from opdlm.common.data.tasks import get_task
from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import Decoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.evaluate.options import QuestionOptions, check_questions

TASK_PROBLEMS = 1000

_OPTIONS = {
    "data.path:": "--data:",
    "data.prompt_field:": "--prompt-field:",
    "data.response_field:": "--answer-field:",
    "data.chat_template:": "--chat:",
    "set data.chat_template to true": "give --chat",
    "put the answer into data.response_field": "put the answer into the column of --answer-field",
}
"""What errors of `read_questions` say of settings -> the same for the options that set them here."""


@dataclass(frozen=True, slots=True)
class Marks:
    """How responses were marked."""

    right: float
    """Share of right answers."""
    unanswered: int
    """Number of responses without any answer; they count as wrong."""


class Questions(Protocol):
    """Prompts, and the way to mark the answers."""

    title: str
    figure: str
    """Name of `Marks.right` in tables."""
    unknown: str | None
    """One line about characters of prompts and answers that the tokenizer does not know; None: it knows them all."""

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The prompts as decode requests."""
        ...

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Marks responses, `[R] int32` each, in the order of the requests."""
        ...


def open_questions(asked: QuestionOptions, decoder: Decoder) -> Questions:
    """Reads the questions and encodes their prompts.

    Raises:
        OpdlmError: there is not exactly one source, or it cannot be used; the row is named.
    """
    check_questions(asked)
    return TaskQuestions(asked, decoder) if asked.data is None else DataQuestions(asked, asked.data, decoder)


class TaskQuestions:
    """Held-out problems of a built-in task."""

    figure = "exact match"

    def __init__(self, asked: QuestionOptions, decoder: Decoder) -> None:
        if asked.chat:
            raise OpdlmError("--chat: built-in tasks have no chat form; it goes with --data or --lm-eval")
        self._problems = HeldOutProblems(
            [get_task(str(asked.task))], decoder.tokenizer, asked.problems or TASK_PROBLEMS, decoder.facts.eos_ids
        )
        self.requests = self._problems.requests
        unknown = UnknownCharacters(decoder.tokenizer)
        for i, ((_, problem), ids) in enumerate(zip(self._problems.problems, self._problems.prompt_ids, strict=True)):
            _note(unknown, f"{asked.task}/test/{i}", problem.prompt, ids, problem.solution, decoder)
        self.unknown = unknown.line()
        self.title = f"{len(self._problems.problems)} held-out problems of {asked.task}"

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """A right answer is the whole solution with an end-of-sequence token."""
        return Marks(self._problems.exact_match(responses), 0)


class DataQuestions:
    """Rows of a data set, each a prompt and a reference answer."""

    def __init__(self, asked: QuestionOptions, file: Path, decoder: Decoder) -> None:
        questions = _read(asked, file)
        self.title = f"{len(questions)} rows of {file.name}"
        self.figure = "exact match" if asked.answer == "exact" else "right (math)"
        self._decoder = decoder
        self._names = [question.name for question in questions]
        self._checks = [_answer_check(asked.answer, question) for question in questions]
        self._prompts = [
            decoder.encode(_prompt_text(asked, question, decoder), templated=asked.chat) for question in questions
        ]
        unknown = UnknownCharacters(decoder.tokenizer)
        for question, ids in zip(questions, self._prompts, strict=True):
            _note(unknown, question.name, question.prompt, ids, question.answer, decoder)
        self.unknown = unknown.line()

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """The rows as decode requests."""
        named = zip(self._names, self._prompts, strict=True)
        return [RolloutRequest(i, name, ids, max_new_tokens, seed=i) for i, (name, ids) in enumerate(named)]

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Marks the text of the responses without special tokens."""
        texts = [self._decoder.text(ids) for ids in responses]
        verdicts = [check(text) for check, text in zip(self._checks, texts, strict=True)]
        return Marks(sum(verdict is True for verdict in verdicts) / len(verdicts), verdicts.count(None))


def _prompt_text(asked: QuestionOptions, question: Question, decoder: Decoder) -> str:
    if not question.prompt:
        raise OpdlmError(f"--prompt-field: {question.name}: {EMPTY}; give every row a prompt")
    if not asked.chat:
        return str(question.prompt)  # `read_questions` takes messages with --chat only
    try:
        return chat_prompt(decoder.tokenizer, question.prompt, asked.thinking)
    except ChatRefused as error:
        raise OpdlmError(f"--chat: {question.name}: {error}") from None


def _note(
    unknown: UnknownCharacters,
    name: str,
    prompt: str | Conversation,
    ids: np.ndarray,
    answer: str,
    decoder: Decoder,
) -> None:
    """Counts the unknown characters of a prompt and of its answer, which no response could equal."""
    unknown.note(name, prompt, ids.tolist())
    unknown.note(name, answer, decoder.encode(answer).tolist())


def _read(asked: QuestionOptions, file: Path) -> list[Question]:
    """Reads the questions of a file; an error names the command's option in place of the run file's setting."""
    prompt, answer = asked.prompt_field, asked.answer_field
    data = DataConfig(path=str(file), chat_template=asked.chat, prompt_field=prompt, response_field=answer)
    try:
        questions = list(itertools.islice(read_questions(data), asked.problems))
    except ConfigError as error:
        text = str(error)
        for setting, option in _OPTIONS.items():
            text = text.replace(setting, option)
        raise OpdlmError(text) from error
    if not questions:
        raise OpdlmError(f"--data: {file} has no rows")
    return questions


def _answer_check(kind: AnswerKind, question: Question) -> AnswerCheck:
    try:
        return ANSWER_CHECKS[kind](question.answer)
    except ValueError as error:
        raise OpdlmError(f"--answer {kind}: {question.name}: {error}") from None
