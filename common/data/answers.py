r"""Marking responses against reference answers: `exact` text, or `math` (math-verify: `\boxed{1/2}` equals `0.5`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from opdlm.common.errors import OpdlmError

AnswerKind = Literal["exact", "math"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

Check = Callable[[str], bool | None]
"""Response text -> right or wrong; None where no answer could be found in it (counts as wrong)."""

_MATH_SIGNS = ("\\boxed", "$", "\\(", "\\[")


def exact(reference: str) -> Check:
    """Equal text, white space at both ends aside."""
    wanted = reference.strip()
    return lambda response: response.strip() == wanted


def math(reference: str) -> Check:
    r"""Equal mathematical value of the response's last `\boxed{}`, else of the answer or number that it ends with.

    math-verify limits its time (5 s an expression) with SIGALRM: check in the main thread only, or it raises
    `ValueError`.

    Args:
        reference: the bare answer (`\frac{1}{2}`, `72`, `(3, \pi)`), or text that marks it with `\boxed{}` or `$`.

    Raises:
        OpdlmError: math-verify is not installed.
        ValueError: it finds nothing in the reference.
    """
    marked = any(sign in reference for sign in _MATH_SIGNS)
    wanted = _parse(reference if marked else f"\\boxed{{{reference}}}")
    if not wanted:
        raise ValueError(f"math-verify reads no answer in {reference!r}; expected a number or LaTeX, as 72 or 1/2")

    def check(response: str) -> bool | None:
        found = _parse(response)
        return bool(_math_verify().verify(wanted, found)) if found else None

    return check


CHECKS: dict[AnswerKind, Callable[[str], Check]] = {"exact": exact, "math": math}


def _parse(text: str) -> list[Any]:
    library = _math_verify()
    # Of several boxes math-verify makes a set; the last one is the answer.
    last_box = text.rfind("\\boxed")
    boxed_first = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    return library.parse(text[max(last_box, 0) :], boxed_first, fallback_mode="no_fallback")


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise OpdlmError("--answer math needs math-verify: pip install 'opdlm-ray[eval]'") from None
    return math_verify
