"""Five small tasks with one alphabet, for measuring what a model forgets.

The teacher is trained on all five, the student is distilled on some of them, and then all five are evaluated.

add      37+4+8=   is answered   37+4=41;41+8=49;49
sub      52-4-8=                 52-4=48;48-8=40;40
sort     s40731=                 01347
copy     c40731=                 40731
reverse  r40731=                 13704
"""

from __future__ import annotations

import random
from collections.abc import Callable

from opdlm.common.data.tasks.base import Problem

ALPHABET = "0123456789+-=;scr"
LARGEST = 59
"""Largest number that a chain starts with or reaches."""


class ChainSkill:
    """Adds two or three digits one after the other, or subtracts them. Every result lies within 0 and 59.

    Args:
        sign: 1 adds, -1 subtracts.
    """

    alphabet = ALPHABET

    def __init__(self, name: str, sign: int) -> None:
        self.name = name
        self._sign = sign

    def draw(self, rng: random.Random) -> Problem:
        """Draws a problem: operands uniformly, the start uniformly among those whose results lie within 0 and 59."""
        operands = [rng.randint(1, 9) for _ in range(rng.randint(2, 3))]
        total = sum(operands)
        value = rng.randint(0, LARGEST - total) if self._sign > 0 else rng.randint(total, LARGEST)
        character = "+" if self._sign > 0 else "-"
        prompt, steps = str(value), []
        for operand in operands:
            result = value + self._sign * operand
            prompt += f"{character}{operand}"
            steps.append(f"{value}{character}{operand}={result}")
            value = result
        return Problem(prompt + "=", ";".join([*steps, str(value)]))

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether every step of the chain is right."""
        return response == problem.solution


class DigitsSkill:
    """Rewrites four to eight random digits.

    Args:
        sign: character in front of the digits, which tells the tasks apart.
        rewrite: digits -> answer.
    """

    alphabet = ALPHABET

    def __init__(self, name: str, sign: str, rewrite: Callable[[str], str]) -> None:
        self.name = name
        self._sign = sign
        self._rewrite = rewrite

    def draw(self, rng: random.Random) -> Problem:
        """Draws a problem: four to eight digits, uniformly."""
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 8)))
        return Problem(f"{self._sign}{digits}=", self._rewrite(digits))

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether every digit is right and in its place."""
        return response == problem.solution


def skills() -> list[ChainSkill | DigitsSkill]:
    """The five tasks: `add`, `sub`, `sort`, `copy`, `reverse`."""
    return [
        ChainSkill("add", 1),
        ChainSkill("sub", -1),
        DigitsSkill("sort", "s", lambda digits: "".join(sorted(digits))),
        DigitsSkill("copy", "c", lambda digits: digits),
        DigitsSkill("reverse", "r", lambda digits: digits[::-1]),
    ]
