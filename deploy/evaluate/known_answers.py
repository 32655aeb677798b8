"""Questions with accepted answers, from a file: how they are read, chosen, asked and marked.

`opdlm eval --data`, `opdlm sweep --data` and `evaluation.data` of a run file use this one reader and its marks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import opdlm.deploy
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import AnswerKind, answer_check
from opdlm.common.data.reranking import RerankAnswer, RerankCase, read_answer, rerank_metrics
from opdlm.common.data.rows import Question, read_questions
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.types import RolloutRequest

_FOLDER = Path(opdlm.deploy.__file__).parent / "questions"
_SEED = 0
"""Of the choice of questions, so that every evaluation of every run asks the same ones."""


@dataclass(frozen=True, slots=True)
class AnswerMarks:
    """What became of each question."""

    right: np.ndarray  # [questions] bool
    unanswered: int
    """Responses in which no answer was found; they count as wrong."""
    by_kind: dict[str, dict[str, float]]
    """By kind, in the order of the file: `right`, the share of right answers, and `questions`. Re-ranking cases are the
    kind `reranking` together, which also has its metrics (`common/data/reranking.py`). Empty: no kinds."""
    reranked: list[RerankAnswer]
    """What each response says; empty where the questions are no re-ranking cases."""


class KnownAnswers:
    """Questions, their prompts as token ids, and the way to mark responses.

    Args:
        prompt_ids: `[P] int32` each.
        mark: how rows are marked that do not say it themselves.
        text: the text of a response `[R] int32`, without special tokens.
        eos_ids: tokens that end a response.
        setting: what sets `mark`, for errors.

    Raises:
        OpdlmError: an answer cannot be marked for, or only some of the rows are re-ranking cases; the row is named.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        prompt_ids: Sequence[np.ndarray],
        mark: AnswerKind,
        text: Callable[[np.ndarray], str],
        eos_ids: Collection[int],
        setting: str = "evaluation.mark",
    ) -> None:
        self.questions, self.prompt_ids, self.text = list(questions), list(prompt_ids), text
        self._mark, self._eos_ids, self._setting = mark, list(eos_ids), setting
        self.cases: list[RerankCase] = [question.case for question in questions if question.case is not None]
        """By question, where they are re-ranking cases; else empty."""
        if 0 < len(self.cases) < len(self.questions):
            name = next(question.name for question in questions if question.case is None)
            raise OpdlmError(f"{name} is no re-ranking case (`candidates`, `target`), others are; make it two files")
        self._checks = []
        for question in questions if not self.cases else ():
            how = question.mark or mark
            try:
                self._checks.append(answer_check(how, question.answers))
            except ValueError as error:
                raise OpdlmError(f"{setting} {how}: {question.name}: {error}") from None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def marks(self) -> set[AnswerKind]:
        """The ways in which the rows are marked."""
        return {question.mark or self._mark for question in self.questions}

    def chosen(self, limit: int | None) -> KnownAnswers:
        """At most `limit` of the questions (None: all), in their order; see `choose_evenly`."""
        if limit is None or limit >= len(self):
            return self
        places = choose_evenly([question.kind for question in self.questions], limit)
        questions, ids = [self.questions[i] for i in places], [self.prompt_ids[i] for i in places]
        return KnownAnswers(questions, ids, self._mark, self.text, self._eos_ids, self._setting)

    @property
    def kinds(self) -> list[str]:
        """The kinds of the questions, in the order of the file."""
        return list(dict.fromkeys(question.kind for question in self.questions if question.kind is not None))

    def requests(self, max_new_tokens: int, first: int = 0) -> list[RolloutRequest]:
        """The questions as decode requests, whose indices count from `first`."""
        named = zip(self.questions, self.prompt_ids, strict=True)
        return [
            RolloutRequest(i, question.name, ids, max_new_tokens, seed=i)
            for i, (question, ids) in enumerate(named, start=first)
        ]

    def mark(self, responses: Sequence[np.ndarray]) -> AnswerMarks:
        """Marks the text of responses, `[R] int32` each, in the order of the questions."""
        texts = [self.text(ids) for ids in responses]
        ended = [bool(np.isin(ids, self._eos_ids).any()) for ids in responses]
        reranked = [read_answer(*of) for of in zip(self.cases, texts, ended, strict=True)] if self.cases else []
        verdicts: list[bool | None] = [
            answer.order is not None and answer.order[0] == case.target
            for answer, case in zip(reranked, self.cases, strict=True)
        ] or [check(text) for check, text in zip(self._checks, texts, strict=True)]
        right = np.array([verdict is True for verdict in verdicts], dtype=bool)
        by_kind = {}
        for kind in self.kinds:
            of = right[[question.kind == kind for question in self.questions]]
            by_kind[kind] = {"right": float(of.mean()), "questions": len(of)}
        if reranked:
            counts = {"right": float(right.mean()), "questions": len(right)}
            by_kind["reranking"] = counts | rerank_metrics(self.cases, reranked)
        return AnswerMarks(right, verdicts.count(None), by_kind, reranked)


def choose_evenly(kinds: Sequence[str | None], count: int) -> list[int]:
    """Places of `count` of the questions, in rising order: as many of each kind, drawn with a fixed seed.

    `kinds`: of all questions. A kind that has too few gives all that it has, and the others more.
    """
    by_kind: dict[str | None, list[int]] = {}
    for place, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(place)
    drawn = [random.Random(_SEED).sample(places, len(places)) for places in by_kind.values()]
    turns = [place for turn in range(max(map(len, drawn))) for places in drawn for place in places[turn : turn + 1]]
    return sorted(turns[:count])


def bundled_questions() -> dict[str, Path]:
    """The files of questions that come with the package: name -> file."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.jsonl"))}


def find_questions(given: str | Path) -> Path:
    """The file that a user means: the file itself, else a bundled one of that name (`knowledge`)."""
    path = Path(given)
    return path if path.exists() else bundled_questions().get(str(given), path)


def read_known(data: DataConfig, names: Mapping[str, str]) -> list[Question]:
    """Reads a file of questions.

    Args:
        data: file and columns.
        names: what errors say of settings of `data` -> what the user has set.

    Raises:
        OpdlmError: the file cannot be read or has no rows, or a row is no question; the row is named.
    """
    try:
        questions = list(read_questions(data))
    except ConfigError as error:
        raise OpdlmError(renamed(str(error), names)) from error
    if not questions:
        raise OpdlmError(f"{names['data.path:']} {data.path} has no rows")
    return questions


def renamed(text: str, names: Mapping[str, str]) -> str:
    """An error's text with other names of settings."""
    for setting, name in names.items():
        text = text.replace(setting, name)
    return text


def first_lines(refused: Iterable[str], most: int = 3) -> str:
    """The first refusals, for a message."""
    lines = list(refused)
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
