"""What a built-in task is: an endless, seeded supply of problems that knows their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and its one right response, as text."""

    prompt: str
    solution: str


class Task(Protocol):
    """To add a task: write a class like `chain.py`'s and enter it in `common/tasks/__init__.py`."""

    name: str
    alphabet: str
    """Every character that prompts and solutions may hold."""

    def draw(self, rng: random.Random) -> Problem:
        """One random problem."""
        ...

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Exact match of the response's text (without the end-of-sequence token)."""
        ...


def split_of(prompt: str) -> Split:
    """One prompt in ten, by its hash, is held out: no generator, seed or run can mix the splits."""
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


def problems(task: Task, split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of distinct-enough problems of one split; equal seeds give equal streams."""
    rng = random.Random(f"{task.name}/{split}/{seed}")
    while True:
        problem = task.draw(rng)
        if split_of(problem.prompt) == split:
            yield problem
