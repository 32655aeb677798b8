"""The task `chain`: chain arithmetic, one step at a time. The prompt `47+8-3=` has the answer `47+8=55;55-3=52;52`."""

from __future__ import annotations

import random

from opdlm.common.data.tasks.base import Problem

LARGEST = 59
"""Largest number that a chain starts with or reaches."""


class ChainTask:
    """Adds two or three digits to a number, or subtracts them. The number and every result lie within 0 and 59."""

    name = "chain"
    alphabet = "0123456789+-=;"

    def draw(self, rng: random.Random) -> Problem:
        """Draws a problem: start and operands uniformly, each sign uniformly among those that stay within 0 and 59."""
        value = rng.randint(0, LARGEST)
        prompt, steps = str(value), []
        for _ in range(rng.randint(2, 3)):
            operand = rng.randint(1, 9)
            sign = rng.choice([s for s in (1, -1) if 0 <= value + s * operand <= LARGEST])
            result = value + sign * operand
            term = f"{'+' if sign > 0 else '-'}{operand}"
            prompt += term
            steps.append(f"{value}{term}={result}")
            value = result
        return Problem(prompt + "=", ";".join([*steps, str(value)]))

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether every step of the chain is right, not only the result."""
        return response == problem.solution
