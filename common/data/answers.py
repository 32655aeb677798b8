r"""Checks responses against reference answers.

Kind `exact` compares the text; kind `math` compares values with math-verify (`\boxed{1/2}` equals `0.5`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from opdlm.common.errors import OpdlmError

AnswerKind = Literal["exact", "math"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

AnswerCheck = Callable[[str], bool | None]
"""Text of a response -> whether its answer is right. None: no answer was found in the text, which counts as wrong."""

_ANSWER_MARKS = ("\\boxed", "$", "\\(", "\\[")


def exact_check(reference: str) -> AnswerCheck:
    """The check that a response equals the reference; white space at both ends does not count."""
    wanted = reference.strip()
    return lambda response: response.strip() == wanted


def math_check(reference: str) -> AnswerCheck:
    r"""The check that a response has the mathematical value of the reference.

    The value of a response is that of its last `\boxed{}`; without a box, that of the answer or number it ends with.
    math-verify limits its time to 5 s per expression with SIGALRM, so call the check in the main thread only; in
    another thread it raises `ValueError`.

    Args:
        reference: the bare answer (`\frac{1}{2}`, `72`, `(3, \pi)`), or text that marks it with `\boxed{}` or `$`.

    Raises:
        OpdlmError: math-verify is not installed.
        ValueError: math-verify finds no answer in the reference.
    """
    marked = any(mark in reference for mark in _ANSWER_MARKS)
    wanted = _parse(reference if marked else f"\\boxed{{{reference}}}")
    if not wanted:
        raise ValueError(f"math-verify reads no answer in {reference!r}; expected a number or LaTeX, such as 72 or 1/2")

    def check(response: str) -> bool | None:
        found = _parse(response)
        return bool(_math_verify().verify(wanted, found)) if found else None

    return check


ANSWER_CHECKS: dict[AnswerKind, Callable[[str], AnswerCheck]] = {"exact": exact_check, "math": math_check}
"""Kind of check -> function that makes the check for one reference answer."""


def _parse(text: str) -> list[Any]:
    library = _math_verify()
    # math-verify takes several boxes for a set, but the last box is the answer.
    last_box = text.rfind("\\boxed")
    boxed_first = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    return library.parse(text[max(last_box, 0) :], boxed_first, fallback_mode="no_fallback")


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise OpdlmError("--answer math needs math-verify: pip install 'opdlm-ray[eval]'") from None
    return math_verify
