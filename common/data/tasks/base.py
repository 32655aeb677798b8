"""What a built-in task is: an endless, seeded supply of problems that knows their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and its one right response, as text."""

    prompt: str
    solution: str
    task: str = ""
    """Which task of a mixture it is from."""


class Task(Protocol):
    """To add a task: write a class like `chain.py`'s and enter it in `common/data/tasks/__init__.py`."""

    name: str
    alphabet: str
    """Every character that prompts and solutions may hold."""

    def draw(self, rng: random.Random) -> Problem:
        """One random problem."""
        ...

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Exact match of the response's text (without the end-of-sequence token)."""
        ...


class MixedTask:
    """Several tasks in equal shares, under the name `a+b`."""

    def __init__(self, parts: list[Task]) -> None:
        self._parts = {part.name: part for part in parts}
        self.name = "+".join(self._parts)
        self.alphabet = "".join(dict.fromkeys("".join(part.alphabet for part in parts)))

    def draw(self, rng: random.Random) -> Problem:
        """A problem of one of them."""
        name = rng.choice(list(self._parts))
        return replace(self._parts[name].draw(rng), task=name)

    def is_correct(self, problem: Problem, response: str) -> bool:
        """As the problem's own task says."""
        return self._parts[problem.task].is_correct(problem, response)


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
