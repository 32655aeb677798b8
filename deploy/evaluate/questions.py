"""Questions with known answers: held-out problems of a built-in task, or a file of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import EMPTY, ChatRefused, chat_prompt
from opdlm.common.data.conversation import Conversation
from opdlm.common.data.reranking import RerankAnswer, RerankCase
from opdlm.common.data.rows import Question
from opdlm.common.data.tasks import get_task
from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.errors import OpdlmError
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import Decoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.evaluate.known_answers import KnownAnswers, choose_evenly, find_questions, read_known
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
_FIGURES = {"exact": "exact match", "contains": "right", "math": "right (math)"}
"""By how rows are marked, the name of the share of right answers."""


@dataclass(frozen=True, slots=True)
class Marks:
    """How responses were marked."""

    right: float
    """Share of right answers."""
    unanswered: int
    """Number of responses without any answer; they count as wrong."""
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind of question: `right` and the number of `questions`. Empty: the questions have no kinds."""
    reranked: list[RerankAnswer] = field(default_factory=list)
    """What each response says; empty where nothing is re-ranked."""


Asked = tuple[str, tuple[str, ...], str | None]
"""A question as text: the prompt, its accepted answers, its kind."""


class Questions(Protocol):
    """Prompts, and the way to mark the answers."""

    title: str
    figure: str
    """Name of `Marks.right` in tables."""
    asked: list[Asked]
    may_be_unanswered: bool
    """Whether a response may hold no answer that can be marked."""
    cases: list[RerankCase]
    """By question, where the task is to re-rank; else empty."""
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
    may_be_unanswered = False

    def __init__(self, asked: QuestionOptions, decoder: Decoder) -> None:
        if asked.chat:
            raise OpdlmError("--chat: built-in tasks have no chat form; it goes with --data or --lm-eval")
        self._problems = HeldOutProblems(
            [get_task(str(asked.task))], decoder.tokenizer, asked.problems or TASK_PROBLEMS, decoder.facts.eos_ids
        )
        self.requests, self.cases = self._problems.requests, self._problems.cases()
        self.asked: list[Asked] = [(p.prompt, (p.solution,), None) for _, p in self._problems.problems]
        unknown = UnknownCharacters(decoder.tokenizer)
        for i, ((_, problem), ids) in enumerate(zip(self._problems.problems, self._problems.prompt_ids, strict=True)):
            _note(unknown, f"{asked.task}/test/{i}", problem.prompt, ids, (problem.solution,), decoder)
        self.unknown = unknown.line()
        self.title = f"{len(self._problems.problems)} held-out problems of {asked.task}"

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """A right answer is the whole solution with an end-of-sequence token."""
        answers = self._problems.reranked(responses, range(len(self.cases)))
        return Marks(self._problems.exact_match(responses), 0, reranked=answers)


class DataQuestions:
    """Rows of a data set, each a prompt and the answers that count as right."""

    def __init__(self, asked: QuestionOptions, file: Path, decoder: Decoder) -> None:
        found = find_questions(file)
        chat = asked.chat or (found != file and decoder.tokenizer.chat_template is not None)
        data = DataConfig(
            path=str(found), chat_template=chat, prompt_field=asked.prompt_field, response_field=asked.answer_field
        )
        questions = read_known(data, _OPTIONS)
        if asked.problems is not None and asked.problems < len(questions):
            questions = [questions[i] for i in choose_evenly([q.kind for q in questions], asked.problems)]
        prompts = [decoder.encode(_prompt_text(asked, q, decoder, chat), templated=chat) for q in questions]
        how, eos_ids = asked.answer or "exact", decoder.facts.eos_ids
        self.known = KnownAnswers(questions, prompts, how, decoder.text, eos_ids, "--answer")
        self.requests, self.cases = self.known.requests, self.known.cases
        self.asked: list[Asked] = [(_shown(q.prompt), q.answers, q.kind) for q in questions]
        self.title = f"{len(questions)} rows of {found.name}"
        self.figure = "R@1" if self.cases else " and ".join(_FIGURES[mark] for mark in sorted(self.known.marks))
        self.may_be_unanswered = "math" in self.known.marks
        unknown = UnknownCharacters(decoder.tokenizer)
        for question, ids in zip(questions, prompts, strict=True):
            _note(unknown, question.name, question.prompt, ids, question.answers, decoder)
        self.unknown = unknown.line()

    def mark(self, responses: Sequence[np.ndarray]) -> Marks:
        """Marks the text of the responses without special tokens."""
        marks = self.known.mark(responses)
        return Marks(float(marks.right.mean()), marks.unanswered, marks.by_kind, marks.reranked)


def _prompt_text(asked: QuestionOptions, question: Question, decoder: Decoder, chat: bool) -> str:
    if not question.prompt:
        raise OpdlmError(f"--prompt-field: {question.name}: {EMPTY}; give every row a prompt")
    if not chat:
        return str(question.prompt)  # `read_questions` takes messages with --chat only
    try:
        return chat_prompt(decoder.tokenizer, question.prompt, asked.thinking)
    except ChatRefused as error:
        raise OpdlmError(f"--chat: {question.name}: {error}") from None


def _shown(prompt: str | Conversation) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _note(
    unknown: UnknownCharacters,
    name: str,
    prompt: str | Conversation,
    ids: np.ndarray,
    answers: Sequence[str],
    decoder: Decoder,
) -> None:
    """Counts the unknown characters of a prompt and of its answers, which no response could equal."""
    unknown.note(name, prompt, ids.tolist())
    for answer in answers:
        unknown.note(name, answer, decoder.encode(answer).tolist())
