"""Chain arithmetic: `47+8-3=` is answered `47+8=55;55-3=52;52`, step by step. Small, but it has to be computed."""

from __future__ import annotations

import random

from opdlm.common.data.tasks.base import Problem

LARGEST = 59


class ChainTask:
    """Two or three digits added to or taken from a number; it and every result lie within 0 and 59."""

    name = "chain"
    alphabet = "0123456789+-=;"

    def draw(self, rng: random.Random) -> Problem:
        """One problem: the start and each operand uniform, the sign uniform among those that stay in range."""
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
        """The whole chain has to be right, not only its end."""
        return response == problem.solution
