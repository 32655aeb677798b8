"""Five small skills with one alphabet, for knowledge retention: teach all, convert with some, examine all.

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


class ChainSkill:
    """Two or three digits added one after the other, or taken away; every result lies within 0 and 59."""

    alphabet = ALPHABET

    def __init__(self, name: str, sign: int) -> None:
        self.name = name
        self._sign = sign

    def draw(self, rng: random.Random) -> Problem:
        """One problem: operands uniform, the start uniform among those that stay in range."""
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
        """The whole chain has to be right."""
        return response == problem.solution


class DigitsSkill:
    """Four to eight random digits, rewritten."""

    alphabet = ALPHABET

    def __init__(self, name: str, sign: str, rewrite: Callable[[str], str]) -> None:
        self.name = name
        self._sign = sign
        self._rewrite = rewrite

    def draw(self, rng: random.Random) -> Problem:
        """One problem."""
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 8)))
        return Problem(f"{self._sign}{digits}=", self._rewrite(digits))

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Every digit in its place."""
        return response == problem.solution


def skills() -> list[ChainSkill | DigitsSkill]:
    """All five."""
    return [
        ChainSkill("add", 1),
        ChainSkill("sub", -1),
        DigitsSkill("sort", "s", lambda digits: "".join(sorted(digits))),
        DigitsSkill("copy", "c", lambda digits: digits),
        DigitsSkill("reverse", "r", lambda digits: digits[::-1]),
    ]
