"""Built-in tasks: what a task is, how its problems are split into training and test, and mixtures of tasks."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from opdlm.common.data.reranking import RerankCase

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and its only right response, as text."""

    prompt: str
    solution: str
    task: str = ""
    """The task that it comes from, where a mixture of tasks drew it; empty otherwise."""
    case: RerankCase | None = None
    """What a re-ranking problem is measured by; None: another task."""


class Task(Protocol):
    """Makes random problems and checks answers to them.

    To add a task, write a class such as `ChainTask` in `chain.py` and enter it in `TASKS` in
    `common/data/tasks/__init__.py`.
    """

    name: str
    alphabet: str
    """Every character that prompts and solutions may contain."""

    def draw(self, rng: random.Random) -> Problem:
        """Draws one random problem."""
        ...

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether the response's text, without the end-of-sequence token, is the right answer to the problem."""
        ...


class MixedTask:
    """Several tasks in equal shares; the name joins theirs, as in `add+sort`."""

    def __init__(self, parts: list[Task]) -> None:
        self._parts = {part.name: part for part in parts}
        self.name = "+".join(self._parts)
        self.alphabet = "".join(dict.fromkeys("".join(part.alphabet for part in parts)))

    def draw(self, rng: random.Random) -> Problem:
        """Draws a task, each equally likely, and one problem of it."""
        name = rng.choice(list(self._parts))
        return replace(self._parts[name].draw(rng), task=name)

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether the task that drew the problem accepts the response."""
        return self._parts[problem.task].is_correct(problem, response)


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: one prompt in ten, chosen by its hash, is a test prompt.

    The split depends on the prompt alone, so no seed, task or run can train on a test prompt.
    """
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


def problems(task: Task, split: Split, seed: int) -> Iterator[Problem]:
    """Yields random problems of one split without end; a problem may come again. Equal seeds give equal problems."""
    rng = random.Random(f"{task.name}/{split}/{seed}")
    while True:
        problem = task.draw(rng)
        if split_of(problem.prompt) == split:
            yield problem
