r"""Checks responses against reference answers: the one place where answers are marked.

Kind `exact` compares the text, `contains` looks for the answer's words in the response, and `math` compares values with
math-verify (`\boxed{1/2}` equals `0.5`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, get_args

from opdlm.common.config.base import AnswerKind
from opdlm.common.errors import OpdlmError

ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

AnswerCheck = Callable[[str], bool | None]
"""Text of a response -> whether its answer is right. None: no answer was found in the text, which counts as wrong."""

_ANSWER_MARKS = ("\\boxed", "$", "\\(", "\\[")
_WORD = re.compile(r"(?:(?<![\w.)])-)?\d+(?:,\d{3})*(?:\.\d+)?|[^\W\d_]+")
"""A number with its sign, commas between thousands and decimals, or a run of letters."""


def exact_check(reference: str) -> AnswerCheck:
    """The check that a response equals the reference; white space at both ends does not count."""
    wanted = reference.strip()
    return lambda response: response.strip() == wanted


def contains_check(reference: str) -> AnswerCheck:
    """The check that a response holds the words of the reference, side by side and in their order.

    Case, accents and punctuation do not count, and only whole words and whole numbers do: `Paris` is in `The capital is
    Paris.`, `4` is neither in `14` nor in `4.5`, and `1000` is in `1,000`. In a script without spaces a run of letters
    is one word.

    Raises:
        ValueError: the reference has no word.
    """
    wanted = _words(reference)
    if not wanted:
        raise ValueError(f"found {reference!r}, which has no word; expected a word or a number, such as Paris or 42")

    def check(response: str) -> bool:
        said = _words(response)
        return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))

    return check


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


ANSWER_CHECKS: dict[AnswerKind, Callable[[str], AnswerCheck]] = {
    "exact": exact_check,
    "contains": contains_check,
    "math": math_check,
}
"""Kind of check -> function that makes the check for one reference answer."""


def answer_check(kind: AnswerKind, accepted: Sequence[str]) -> AnswerCheck:
    """The check that a response has any one of the accepted answers.

    Raises:
        OpdlmError: math-verify is not installed.
        ValueError: an accepted answer cannot be checked for.
    """
    checks = [ANSWER_CHECKS[kind](reference) for reference in accepted]

    def check(response: str) -> bool | None:
        verdicts = [one(response) for one in checks]
        return None if all(verdict is None for verdict in verdicts) else any(verdicts)

    return check


def _words(text: str) -> list[str]:
    """Words without case and accents; a number without commas and without zeros behind its decimals."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    found = (word.replace(",", "") if word[-1].isdigit() else word for word in _WORD.findall(plain))
    return [word.rstrip("0").rstrip(".") if "." in word else word for word in found]


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
        raise OpdlmError("marking by `math` needs math-verify: pip install 'opdlm-ray[eval]'") from None
    return math_verify
