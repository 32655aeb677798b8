"""The questions of a run's evaluations: held-out problems of its tasks, and the questions of `evaluation.data`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import EMPTY, ChatRefused, ChatTemplate
from opdlm.common.data.conversation import blank_message
from opdlm.common.data.rows import Question
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.held_out import EvaluationResult, HeldOutProblems
from opdlm.deploy.evaluate.known_answers import KnownAnswers, find_questions, first_lines, read_known, renamed

Item = TypeVar("Item")

_SETTINGS = {
    "data.path:": "evaluation.data:",
    "data.prompt_field:": "evaluation.prompt_field:",
    "data.response_field:": "evaluation.answer_field:",
    "data.chat_template:": "evaluation.chat_template:",
    "set data.chat_template to": "set evaluation.chat_template to",
    "put the answer into data.response_field": "put the answer into the column of evaluation.answer_field",
}
"""What errors say of the settings of training prompts -> the same for those of questions."""


class Exam:
    """Problems of tasks and questions with known answers, asked together.

    Attributes:
        prompt_ids: `[P] int32` each, of the problems first.
        known: the questions; None: there are none.
    """

    def __init__(self, problems: HeldOutProblems | None, known: KnownAnswers | None) -> None:
        self._problems, self.known = problems, known
        self._count = len(problems.prompt_ids) if problems else 0
        self.prompt_ids = [*(problems.prompt_ids if problems else []), *(known.prompt_ids if known else [])]

    def requests(self, max_new_tokens: int) -> list[RolloutRequest]:
        """Everything as decode requests."""
        problems = self._problems.requests(max_new_tokens) if self._problems else []
        return problems + (self.known.requests(max_new_tokens, first=self._count) if self.known else [])

    def of_known(self, items: Sequence[Item]) -> Sequence[Item]:
        """What belongs to the questions with known answers, of a list with an item for each request."""
        return items[self._count :]

    def result(self, responses: Sequence[np.ndarray], steps: Sequence[int], seconds: float) -> EvaluationResult:
        """Marks the answers; the arguments are those of `HeldOutProblems.result`.

        `exact_match` of the result is the share of right answers to all that was asked.
        """
        count, tokens = self._count, sum(len(response) for response in responses)
        of_tasks = self._problems.result(responses[:count], steps[:count], seconds) if self._problems else None
        if self.known is None:
            assert of_tasks is not None, "an exam asks something"
            return of_tasks
        marks = self.known.mark(responses[count:])
        right = int(marks.right.sum()) + (of_tasks.exact_match * count if of_tasks else 0)
        return EvaluationResult(
            problems=len(responses),
            exact_match=right / len(responses),
            tokens_per_step=tokens / sum(steps),
            tokens_per_second=tokens / seconds,
            by_task=of_tasks.by_task if of_tasks else {},
            data_right=float(marks.right.mean()),
            by_kind=marks.by_kind,
        )


def load_known(
    config: OpdlmConfig, tokenizer: PreTrainedTokenizerBase, longest: int, eos_ids: Collection[int]
) -> tuple[KnownAnswers | None, str | None]:
    """Reads `evaluation.data` and encodes its prompts.

    Args:
        longest: the longest prompt that leaves room for its answer; longer ones, and empty ones, are refused.
        eos_ids: tokens that end a response.

    Returns: the questions, and a line about those that were refused. None for what there is not.

    Raises:
        OpdlmError: the file cannot be used, or no question is left; file and row are named.
    """
    asked = config.evaluation
    if asked.data is None or config.run.replay is not None:
        return None, None
    chat = config.data.chat_template if asked.chat_template is None else asked.chat_template
    file = find_questions(asked.data)
    data = DataConfig(
        path=str(file),
        chat_template=chat,
        prompt_field=asked.prompt_field,
        response_field=asked.answer_field,
        system_prompt=config.data.system_prompt if chat else None,
        thinking=config.data.thinking if chat else None,
    )
    encode = _encoder(data, tokenizer)
    kept: list[tuple[Question, np.ndarray]] = []
    refused = []
    for question in read_known(data, _SETTINGS):
        if reason := _blank(question):
            refused.append(f"{question.name}: {reason}")
            continue
        ids = np.array(encode(question), dtype=np.int32)
        if not 0 < len(ids) <= longest:
            refused.append(f"{question.name}: {len(ids)} tokens; expected 1 to {longest}")
        else:
            kept.append((question, ids))
    note = f"evaluation.data: {len(refused)} of {len(refused) + len(kept)} questions are refused: "
    if not kept:
        raise ConfigError(note + first_lines(refused))
    known = KnownAnswers(
        [q for q, _ in kept], [ids for _, ids in kept], asked.mark or "exact", _text_reader(tokenizer, eos_ids), eos_ids
    )
    return known, note + first_lines(refused) if refused else None


def _encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Question], list[int]]:
    encode_text = PromptEncoder(tokenizer)
    try:
        chat = ChatTemplate(tokenizer, data.system_prompt, data.thinking) if data.chat_template else None
    except ConfigError as error:
        raise ConfigError(renamed(str(error), _SETTINGS).replace("set data.", "set evaluation.")) from None

    def encode(question: Question) -> list[int]:
        if chat is None:
            return encode_text(str(question.prompt))  # `read_questions` takes messages with a chat template only
        try:
            return chat.ids(question.prompt)
        except ChatRefused as error:
            raise OpdlmError(f"evaluation.chat_template: {question.name}: {error}") from None

    return encode


def _blank(question: Question) -> str | None:
    if isinstance(question.prompt, str):
        return None if question.prompt.strip() else EMPTY
    number = blank_message(question.prompt)
    return None if number is None else f"message {number} (user) is empty"


def _text_reader(tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> Callable[[np.ndarray], str]:
    def text(response: np.ndarray) -> str:
        ends = np.flatnonzero(np.isin(response, list(eos_ids)))
        return tokenizer.decode(response[: ends[0]] if ends.size else response, skip_special_tokens=True)

    return text
